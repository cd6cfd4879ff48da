"""Exported models: writing a folder, and loading it again.

``dense`` folders have the original shapes, with zeros where groups were pruned. Plain ``AutoModel`` loads them, and
``AutoModelForSequenceClassification`` where `ExportFacts.has_plain_classifier`; the LoRA lies in ``adapter/`` for
``PeftModel`` unless it is merged. ``sliced`` folders have small shapes and need `fedsim.learn.export.small_models`,
which importing this module registers. The head is in ``head.safetensors`` either way; a language model has none of
ours, and ``AutoModelForCausalLM`` loads it. ``README.md`` says how to load.

What we chose: weights in fp32 whatever the run's precision (a run whose products with frozen weights ran in bf16 agrees
to its rounding); all components of the global LoRA, as in the run's own tests of accuracy, whatever rank a client last
trained; dropout 0, as in the run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fedsim.errors import ModelError, RunError
from fedsim.families.family import DecoderBlock
from fedsim.families.family_catalogue import family_of
from fedsim.learn.export.card import ExportFacts, card_text
from fedsim.learn.export.peft_folder import write_peft_folder
from fedsim.learn.export.small_models import PREFIX, shape_of, sliced_classes, sliced_config
from fedsim.learn.export.weights import encoder_tensors, export_adapter
from fedsim.learn.model.adapter import Adapter
from fedsim.learn.model.backbone import Backbone, quiet
from fedsim.learn.model.heads import NextToken, SentenceClassifier, make_head
from fedsim.places import user_path
from fedsim.settings import ModelSettings
from fedsim.structure import Structure

FACTS = "fedsim_export.json"
_Model = TypeVar("_Model", SentenceClassifier, NextToken)


def write_export(
    folder: Path,
    backbone: Backbone,
    adapter: Adapter,
    structure: Structure,
    settings: ModelSettings,
    facts: ExportFacts,
) -> None:
    """Write weights, adapter, head, tokenizer and card into `folder`, which is made.

    Args:
        backbone: in fp32 and without LoRA layers.
        adapter: the global one, at full widths.
        settings: the run's, with `name` the place where the export will lie.
        facts: `facts.format` and `facts.merged` say how to write.
    Raises:
        RunError: the folder cannot be written.
    """
    dense = facts.format == "dense"
    merged = adapter if facts.merged else None
    tensors = encoder_tensors(backbone, structure, dense, merged, facts.lora_scale)
    head = {name: tensor.detach().cpu().float().contiguous() for name, tensor in adapter.head.items()}
    prefix = f"{backbone.encoder.base_model_prefix}." if facts.is_plain else ""
    model = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    if facts.has_plain_classifier:
        model |= {_library_name(name, facts): tensor.clone() for name, tensor in head.items()}
    output, config = backbone.output, _config(backbone, structure, facts)
    block = family_of(backbone.shape).block
    if output is not None and isinstance(block, DecoderBlock) and not config.tie_word_embeddings:
        model[f"{block.output}.weight"] = output.weight.detach().to("cpu", torch.float32).contiguous()
    masks = {
        "head_mask": torch.from_numpy(structure.head_mask.copy()),
        "channel_mask": torch.from_numpy(structure.channel_mask.copy()),
    }
    try:
        folder.mkdir(parents=True)
        save_file(model, folder / "model.safetensors", metadata={"format": "pt"})
        if head:
            save_file(head, folder / "head.safetensors")
        save_file(masks, folder / "structure.safetensors")
        config.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        if not facts.merged:
            restricted = export_adapter(adapter, structure, backbone.shape, dense)
            write_peft_folder(folder / "adapter", backbone, restricted, settings)
        text = json.dumps(dataclasses.asdict(facts), indent=2, sort_keys=True) + "\n"
        (folder / FACTS).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(card_text(facts), encoding="utf-8")
        for weights in folder.glob("*.safetensors"):
            shutil.copymode(folder / "README.md", weights)  # the library leaves them readable by their owner alone
    except OSError as error:
        raise RunError(f"cannot write the export '{settings.name}': {error.strerror or error}") from error
    except SafetensorError as error:
        raise RunError(f"cannot write the export '{settings.name}': {error}") from error


def _library_name(name: str, facts: ExportFacts) -> str:
    """What the library's classifier calls a parameter of our head."""
    *module, leaf = name.removeprefix("head.").split(".")
    return f"{(facts.family.classifier or {})['.'.join(module)]}.{leaf}"


def _config(backbone: Backbone, structure: Structure, facts: ExportFacts) -> Any:
    config: Any = copy.deepcopy(backbone.encoder.config)
    if facts.format == "sliced":
        config = sliced_config(config, facts.family, structure)
    kind = "ForSequenceClassification" if facts.has_plain_classifier else "Model"
    if facts.is_language_model:
        kind = "ForCausalLM"
    small = PREFIX if facts.format == "sliced" else ""
    config.architectures = [f"{small}{facts.family.title}{kind}"]
    config.dtype = torch.float32
    if facts.is_language_model:
        return config
    config.id2label = dict(enumerate(facts.label_names))
    config.label2id = {name: place for place, name in enumerate(facts.label_names)}
    return config


@dataclass(frozen=True, eq=False)
class Exported:
    """An export in memory, ready to classify.

    Attributes:
        model: ``forward(input_ids, attention_mask, token_type_ids=None) -> logits (batch, labels)``, of a language
            model ``(batch, tokens, vocab)``, in eval mode.
        tokenizer: of the same folder.
        facts: what the export says of itself.
    """

    model: SentenceClassifier | NextToken
    tokenizer: Any
    facts: ExportFacts

    @torch.no_grad()
    def logits(self, sentences: Sequence[str], pairs: Sequence[str] | None = None) -> torch.Tensor:
        """Class scores ``(sentences, labels)``; the classes are ``facts.label_names``.

        Of a language model scores of each token's successor, ``(sentences, tokens, vocab)``, padded on the right.

        Args:
            pairs: second sentences, as many.
        Raises:
            ValueError: no sentences, or a string in the place of a list of them.
        """
        if isinstance(sentences, str) or isinstance(pairs, str) or not len(sentences):
            raise ValueError("logits takes a list of at least one sentence (and of as many second sentences)")
        inputs = self.tokenizer(
            list(sentences),
            None if pairs is None else list(pairs),
            padding=True,
            truncation=True,
            max_length=self.facts.max_length,
            return_tensors="pt",
        )
        logits: torch.Tensor = self.model(**inputs)
        return logits


def load_exported(folder: str | Path) -> Exported:
    """Load what ``fedsim export`` wrote, of any format.

    Raises:
        ModelError: not such a folder, or a damaged one.
    """
    folder = user_path(folder)
    try:
        facts = _read_facts(folder)
        options: dict[str, Any] = {}
        auto: Any = AutoModelForCausalLM if facts.is_language_model else AutoModel
        sliced_classes(facts.family)  # registered, whenever the family became known
        if facts.family.pooler_option:
            options["add_pooling_layer"] = facts.family.pooled == "pooler" and facts.pooling == "native"
        with quiet():
            encoder, report = auto.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
            )
        if report["missing_keys"]:
            raise ValueError(f"weights are missing, such as {min(report['missing_keys'])}")
        if not facts.merged:
            from peft import PeftModel  # takes seconds to import, and a merged export does without

            PeftModel.from_pretrained(encoder, str(folder / "adapter"))  # puts its layers into the encoder itself
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if facts.is_language_model:
            return Exported(_still(NextToken(encoder)), tokenizer, facts)
        shape = dataclasses.replace(shape_of(encoder.config, facts.family), labels=len(facts.label_names))
        head = make_head(shape, facts.pooling)
        weights = load_file(folder / "head.safetensors")
        head.load_state_dict({name.removeprefix("head."): tensor for name, tensor in weights.items()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"'{folder}' is not a folder that fedsim export wrote, or it is damaged ({first})") from error
    return Exported(_still(SentenceClassifier(encoder, head, facts.family, facts.pooling)), tokenizer, facts)


def _still(model: _Model) -> _Model:
    return model.requires_grad_(False).eval()


def _read_facts(folder: Path) -> ExportFacts:
    values = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    known = {one.name for one in dataclasses.fields(ExportFacts)}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ExportFacts(**{name: value for name, value in {**values, **lists}.items() if name in known})
