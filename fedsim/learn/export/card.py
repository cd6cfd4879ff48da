"""The card of an exported model: where it comes from, what was cut, and how to load it, as code that runs as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fedsim.errors import ModelError
from fedsim.families.family import Family
from fedsim.families.family_catalogue import find_family

Format = Literal["dense", "sliced"]
FORMATS: tuple[Format, ...] = ("dense", "sliced")


@dataclass(frozen=True)
class ExportFacts:
    """What the card says.

    Attributes:
        whose: one line, such as "client 3" or "consensus".
        architecture: name of the backbone's family.
        format, merged: how it is written; merged: the LoRA is added to the weights and there is no adapter folder.
        pooling: ``native`` or ``mean``.
        label_names: classes in the order of the logits; none for a language model.
        max_length: tokens to which text was cut in training.
        lora_rank, lora_scale: of the adapter (c of ``dW = c B A``).
        prune_ratio: removed / all prunable weights, achieved.
        notes: what a reader must know, one sentence each.
        run: provenance, JSON values.
    """

    whose: str
    format: Format
    merged: bool
    architecture: str
    pooling: str
    label_names: tuple[str, ...]
    max_length: int
    lora_rank: int
    lora_scale: float
    prune_ratio: float
    kept_heads: tuple[int, ...]
    kept_channels: tuple[int, ...]
    notes: tuple[str, ...] = ()
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        """The backbone's family. Raises ModelError where it is unknown here."""
        family = find_family(self.architecture)
        if family is None:
            raise ModelError(f"the backbone is of type '{self.architecture}', which is not a known family")
        return family

    @property
    def is_language_model(self) -> bool:
        """Whether it predicts the next token, by the base model's own output."""
        return not self.label_names

    @property
    def has_plain_classifier(self) -> bool:
        """Whether the library's own sequence classifier has our head's form: encoders with native pooling.

        A decoder's has no bias, and finds the last token by the padding token instead of the mask.
        """
        return not self.is_language_model and self.pooling == "native" and self.family.classifier is not None

    @property
    def is_plain(self) -> bool:
        """Whether one of the library's own models, as a whole, gives the logits."""
        return self.has_plain_classifier or self.is_language_model


def card_text(facts: ExportFacts) -> str:
    """``README.md`` of the folder."""
    run = facts.run
    labels = "; ".join(str(label) for label in run.get("labels") or ()) or "none"
    rows = [
        ("whose structure", facts.whose),
        ("format", f"{facts.format}, LoRA {'merged into the weights' if facts.merged else 'in adapter/'}"),
        ("pruning ratio", f"{facts.prune_ratio:.4f} (removed / all prunable weights, achieved)"),
        ("kept head groups by layer", ", ".join(map(str, facts.kept_heads))),
        ("kept channels by layer", ", ".join(map(str, facts.kept_channels))),
        ("LoRA", f"rank {facts.lora_rank}, alpha / rank {facts.lora_scale:g}"),
        ("pooling", "none" if facts.is_language_model else facts.pooling),
        ("classes", ", ".join(facts.label_names) or "none: logits are those of the next token"),
        ("text cut to", f"{facts.max_length} tokens"),
        ("method", str(run.get("method"))),
        ("seed", str(run.get("seed"))),
        ("rounds", str(run.get("rounds"))),
        ("base model", f"{run.get('model')} (sha256 {run.get('model_sha256')})"),
        ("data", f"{run.get('data')} (sha256 {run.get('data_sha256')})"),
        ("configuration hash", str(run.get("config_hash"))),
        ("trace hash", str(run.get("trace_hash"))),
        ("fedsim", str(run.get("fedsim"))),
        ("labels", labels),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    notes = "".join(f"\n{note}\n" for note in facts.notes)
    return (
        "# A model exported by fedsim\n\n"
        "Federated LoRA on a pruned backbone; the devices of the run were simulated, the learning was real.\n"
        f"{notes}\n| | |\n|---|---|\n{table}\n\n"
        "## Loading\n\n"
        f"{_words(facts)}\n\n```python\n{loading_code(facts)}```\n\n"
        'With fedsim, for every kind of export: `fedsim.load_exported("FOLDER").logits(["a sentence"])`.\n\n'
        "The same facts for programs: `fedsim_export.json`; which groups are kept: `structure.safetensors` (masks\n"
        "`head_mask` and `channel_mask`, a row per layer)"
        f"{'' if facts.is_language_model else '; the head by itself: `head.safetensors`'}.\n"
    )


def loading_code(facts: ExportFacts) -> str:
    """Python that sets `logits` for the list `sentences`, with `folder` the path of the export.

    It needs torch and transformers; peft where the LoRA is not merged; fedsim where the shapes are small.
    """
    auto = "AutoModelForSequenceClassification" if facts.has_plain_classifier else "AutoModel"
    if facts.is_language_model:
        auto = "AutoModelForCausalLM"
    lines = ["import torch"]
    if not facts.merged:
        lines.append("from peft import PeftModel")
    if not facts.is_plain:
        lines.append("from safetensors.torch import load_file")
    lines.append(f"from transformers import {auto}, AutoTokenizer")
    if facts.format == "sliced":
        lines.append("import fedsim.learn.export.exported  # registers the small shapes")
    types = "" if facts.family.types == "read" else ", return_token_type_ids=False"
    lines += [
        "",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"inputs = tokenizer(sentences, padding=True, truncation=True, max_length={facts.max_length}, "
        f'return_tensors="pt"{types})',
    ]
    if facts.is_plain:
        lines.append(f"model = {auto}.from_pretrained(folder)")
        if not facts.merged and facts.is_language_model:
            lines.append('model = PeftModel.from_pretrained(model, f"{folder}/adapter")')
        elif not facts.merged:
            lines.append('PeftModel.from_pretrained(model.base_model, f"{folder}/adapter")  # into the model, in place')
        lines += ["with torch.no_grad():", "    logits = model.eval()(**inputs).logits"]
        return "\n".join(lines) + "\n"
    options = ", add_pooling_layer=False" if facts.family.pooler_option else ""
    lines.append(f"model = AutoModel.from_pretrained(folder{options})")
    if not facts.merged:
        lines.append('model = PeftModel.from_pretrained(model, f"{folder}/adapter")')
    lines += [
        'head = load_file(f"{folder}/head.safetensors")',
        'mask = inputs["attention_mask"]',
        "with torch.no_grad():",
        "    tokens = model.eval()(**inputs).last_hidden_state",
        *_pooling_lines(facts),
        '    logits = torch.nn.functional.linear(pooled, head["head.weight"], head["head.bias"])',
    ]
    return "\n".join(lines) + "\n"


def _pooling_lines(facts: ExportFacts) -> list[str]:
    if facts.pooling == "mean":
        return ["    pooled = (tokens * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)"]
    return ["    pooled = tokens[torch.arange(len(tokens)), mask.cumsum(dim=1).argmax(dim=1)]  # the last token"]


def _words(facts: ExportFacts) -> str:
    plain = (
        "It is a causal language model of the library's own form."
        if facts.is_language_model
        else "The library's own sequence classifier has this head's form and loads it."
        if facts.has_plain_classifier
        else "The library has no classifier of this form (pooling or head differ), so the head lies beside the encoder."
    )
    if facts.format == "sliced":
        return f"{plain} The small shapes need fedsim's model classes. `folder` is this folder:"
    return f"{plain} Nothing of fedsim is needed. `folder` is this folder:"
