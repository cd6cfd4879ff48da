"""Reading a configuration: YAML file or preset, ``key=value`` overrides, the method's defaults, and the checks.

Precedence, low to high: defaults of `fedsim.settings`, of the policy, of the method, the file, the overrides.
Paths inside a configuration are relative to the working directory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedsim.control.policies import policy_facts
from fedsim.errors import ConfigError, nearest
from fedsim.learn.entries import CRITERIA, RULES
from fedsim.methods.base import Method
from fedsim.methods.catalogue import METHODS, method_named
from fedsim.places import user_path
from fedsim.resources import resource_folder
from fedsim.runner.modes import mode_faults
from fedsim.runner.plain import plain
from fedsim.settings import Config
from fedsim.yaml_text import YamlError, read_yaml, shown

Tree = dict[str, Any]

_ALSO = "\n  and "
"""Between the sentences of a refusal with several reasons."""


def find_config(name: str | Path) -> Path:
    """Path of a configuration: a file, or the name of a preset that travels with the package.

    Raises:
        ConfigError: neither exists.
    """
    path = user_path(name)
    if path.is_file():
        return path
    folder = resource_folder("experiments")
    files = sorted(file for file in folder.rglob("*.yaml") if file.name != "tiny.yaml")
    presets = {str(file.relative_to(folder).with_suffix("")): file for file in files}
    asked = Path(*path.parts[1:]) if path.parts[:1] == (folder.name,) else path
    wanted = str(asked.with_suffix("") if asked.suffix == ".yaml" else asked)
    if wanted in presets:
        return presets[wanted]
    raise ConfigError(f"no configuration file '{name}' (give a YAML file, or a preset: {', '.join(presets)})")


def read_tree(path: Path) -> Tree:
    """The raw mapping in a YAML file."""
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except (YamlError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration '{path}' is not readable YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"configuration '{path}' cannot be read: {error.strerror}") from error
    if tree is None:
        raise ConfigError(f"configuration '{path}' is empty; it needs at least one key, such as 'method'")
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration '{path}' holds a {type(tree).__name__}; a mapping of sections is needed")
    return tree


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """``["train.local_steps=10", ...]`` to dotted keys and YAML-parsed values."""
    values: dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{item}' is not of the form key=value, such as train.local_steps=10")
        try:
            values[key.strip()] = read_yaml(text)
        except YamlError as error:
            raise ConfigError(f"override '{shown(item)}': the value is not readable YAML: {error}") from error
    return values


def _set(tree: Tree, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for depth, name in enumerate(parents):
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"'{'.'.join(parents[: depth + 1])}' is a single value, so '{dotted}' cannot be set")
        tree = child
    tree[leaf] = value


def _merge(low: Tree, high: Mapping[str, Any]) -> Tree:
    """`high` laid over `low`, section by section."""
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _sentences(error: ValidationError, model: type[BaseModel] = Config, inside: tuple[str, ...] = ()) -> str:
    """Every key that is not allowed: a sentence with field, value and what is allowed.

    Args:
        model: what was read.
        inside: the section in which it is.
    """
    return _ALSO.join(dict.fromkeys(_sentence(one, error, model, inside) for one in error.errors()))


def _sentence(first: ErrorDetails, error: ValidationError, model: Any, inside: tuple[str, ...]) -> str:
    # Union members and the like add parts to the location that are no keys.
    parts = [str(part) for part in first["loc"]]
    path = list(inside)
    for part in parts:
        fields = getattr(model, "model_fields", {})
        if first["type"] == "extra_forbidden" and part not in fields:
            where = f" in section '{'.'.join(path)}'" if path else ""
            allowed = ", ".join(sorted(fields))
            return f"unknown key '{'.'.join([*path, part])}'{nearest(part, fields)} (allowed{where}: {allowed})"
        if part not in fields:
            break
        path.append(part)
        model = fields[part].annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
    own = path[len(inside) :]
    messages = [e["msg"] for e in error.errors() if [str(p) for p in e["loc"]][: len(own)] == own]
    allowed = " or ".join(dict.fromkeys(m.removeprefix("Input ") for m in messages))
    value = first["input"]
    if first["type"] in ("missing", "too_long", "tuple_type"):
        allowed = f"should be a list of {len(get_args(model))} numbers"
    return f"{'.'.join(path)}: value {shown(repr(value))} is not allowed (it {allowed})"


def build_config(tree: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """A checked `Config` from a raw mapping and dotted overrides.

    Raises:
        ConfigError: one sentence naming the key, its value and what is allowed.
    """
    user: Tree = plain(dict(tree))  # a copy: the caller's own sections must not take the overrides
    for key, value in (overrides or {}).items():
        _set(user, key, plain(value))
    name = user.get("method", Config.model_fields["method"].default)
    if not isinstance(name, str):
        raise ConfigError(f"method: value {name!r} is not allowed (it should be one of {', '.join(sorted(METHODS))})")
    method = method_named(name)
    layered: Tree = {}
    for key, value in (_policy_defaults(method, user) | dict(method.defaults)).items():
        _set(layered, key, value)
    for section, field in Config.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        if is_section and section in user and not isinstance(user[section], Mapping):
            if user[section] is None:
                user[section] = {}
                continue
            raise ConfigError(f"{section}: value {user[section]!r} is not allowed (it should be a section of keys)")
    try:
        config = Config.model_validate(_merge(layered, user))
    except ValidationError as error:
        raise ConfigError(_sentences(error)) from error
    try:
        options = method.options.model_validate(config.method_options)
    except ValidationError as error:
        raise ConfigError(_sentences(error, method.options, ("method_options",))) from error
    config = config.model_copy(update={"method_options": options.model_dump(mode="json")})
    _check(config, method)
    return config


def _policy_defaults(method: Method, user: Tree) -> dict[str, Any]:
    """Keys that the policy sets which the method and the user settle on."""
    policy = method.defaults.get("control.policy", Config().control.policy)
    section = user.get("control")
    if isinstance(section, Mapping):
        policy = section.get("policy", policy)
    return dict(policy_facts(policy).defaults) if isinstance(policy, str) else {}


def load_config(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, override and check a configuration file or preset."""
    return build_config(read_tree(find_config(name)), overrides)


def _check(config: Config, method: Method) -> None:
    """Raise `ConfigError` on keys that do not go together: all of them at once, a line each."""
    faults = list(_faults(config, method))
    if faults:
        raise ConfigError(_ALSO.join(faults))


def _faults(config: Config, method: Method) -> Iterator[str]:
    """What is wrong across sections, as far as neither data nor model are needed to see it."""
    train, prune, model = config.train, config.prune, config.model
    iterative = method.prunes and method.iterative
    if config.local_recovery_steps >= train.local_steps and method.prunes:
        yield (
            f"train.recovery_steps: value {config.local_recovery_steps} is not allowed (they are taken from "
            f"train.local_steps = {train.local_steps}, so at most {train.local_steps - 1})"
        )
    before = train.local_steps - (config.local_recovery_steps if iterative else 0)
    if method.prunes and prune.importance_every > before > 0:
        yield (
            f"prune.importance_every: value {prune.importance_every} is not allowed (at most the {before} local steps "
            "before pruning, or importance would never be estimated)"
        )
    if iterative and config.prune_warmup_rounds >= config.server.rounds:
        yield (
            f"prune.warmup_rounds: value {config.prune_warmup_rounds} is not allowed (less than server.rounds = "
            f"{config.server.rounds}; null takes a quarter of them)"
        )
    elif iterative and config.prune_end_round <= config.prune_warmup_rounds:
        yield (
            f"prune.end_round: value {config.prune_end_round} is not allowed (it must be after "
            f"prune.warmup_rounds = {config.prune_warmup_rounds}; null takes three quarters of server.rounds)"
        )
    if iterative and prune.end_round is not None and prune.end_round > config.server.rounds:
        yield (
            f"prune.end_round: value {prune.end_round} is not allowed (at most server.rounds = {config.server.rounds}, "
            "or the target is never reached; null takes three quarters of them)"
        )
    reached = (config.server.rounds - config.prune_warmup_rounds) * (prune.max_step or 1.0)
    if iterative and config.prune_warmup_rounds < config.server.rounds and reached < prune.target - 1e-9:
        least = prune.target / (config.server.rounds - config.prune_warmup_rounds)
        yield (
            f"prune.max_step: value {prune.max_step} is not allowed (in {config.server.rounds} rounds with warm-up "
            f"{config.prune_warmup_rounds} no ratio gets beyond {reached:.3g}, and prune.target = {prune.target} is "
            f"never reached; at least {least:.2g}, or null)"
        )
    if iterative and prune.structure == "common" and config.prune_warmup_rounds < 1:
        yield (
            "prune.warmup_rounds: value 0 is not allowed with prune.structure common (at least 1: the averaged "
            "importance that draws the common mask comes from rounds before the first cut)"
        )
    if prune.recovery_rounds >= config.server.rounds:
        yield (
            f"prune.recovery_rounds: value {prune.recovery_rounds} is not allowed (they are taken from server.rounds = "
            f"{config.server.rounds}, so at most {config.server.rounds - 1})"
        )
    if method.prunes and prune.target_scope == "fleet_mean" and prune.max_ratio < prune.target:
        yield (
            f"prune.max_ratio: value {prune.max_ratio} is not allowed (with target_scope fleet_mean it is at least "
            f"prune.target = {prune.target})"
        )
    if model.lora_rank > model.lora_rank_max:
        yield (
            f"model.lora_rank: value {model.lora_rank} is not allowed (at most model.lora_rank_max = "
            f"{model.lora_rank_max})"
        )
    if model.lora_rank_max < 2:
        yield ("model.lora_rank_max: value 1 is not allowed (at least 2: the ranks on offer are 2, 4, 8, ...)")
    criterion, rule = CRITERIA.get(prune.criterion), RULES.get(config.aggregate.rule)
    if method.prunes and model.lora_targets != "all" and criterion is not None and criterion.every_linear:
        yield (
            f"model.lora_targets: value {model.lora_targets!r} is not allowed with prune.criterion {criterion.name} "
            "(it must be 'all': importance is estimated from the LoRA gradients of every prunable Linear)"
        )
    if rule is not None and rule.equal_ranks and not policy_facts(config.control.policy).one_rank:
        yield (
            f"aggregate.rule: value {rule.name!r} is not allowed with control.policy {config.control.policy!r} "
            "(it needs equal ranks: use policy uniform, or rule lowrank)"
        )
    yield from method.refuses(config)
    if config.train.engine in ("none", "surrogate") and method.prunes and prune.selection == "global":
        yield (
            f"prune.selection: value 'global' is not allowed with train.engine {config.train.engine} (which layers "
            "lose how much is known only from training; layer_local is allowed)"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", train.torch_device):
        yield f"train.torch_device: value {train.torch_device!r} is not allowed (auto, cpu, cuda or cuda:N)"
    if train.engine == "reference" and train.precision == "bf16":
        yield (
            "train.precision: value 'bf16' is not allowed with train.engine reference (the oracle stays in fp32; fp32 "
            "or auto)"
        )
    if train.engine == "surrogate" and train.surrogate is None:
        yield (
            "train.surrogate: value null is not allowed with train.engine surrogate (give the file that fedsim "
            "fit-surrogate wrote)"
        )
    if train.engine != "surrogate" and train.surrogate is not None:
        yield (
            f"train.surrogate: value {train.surrogate!r} is not allowed with train.engine {train.engine} (only with "
            "engine surrogate; null takes it away)"
        )
    if config.data.name is not None and config.data.path is not None:
        yield (
            f"data.path: value {config.data.path!r} is not allowed beside data.name = "
            f"{config.data.name!r} (give one of them; data.name=null takes a preset's away)"
        )
    if config.data.task == "causal_lm" and model.pooling != "native":
        yield (
            f"model.pooling: value {model.pooling!r} is not allowed with data.task causal_lm (native: every token "
            "predicts the next one, and nothing is pooled)"
        )
    everyone = config.server.clients_per_round == "all" and config.server.concurrency is None
    if config.server.over_selection > 0 and everyone:
        yield (
            f"server.over_selection: value {config.server.over_selection:g} is not allowed with "
            "server.clients_per_round all (nobody is left to select; give a number of clients)"
        )
    yield from mode_faults(config, method)


def config_hash(config: Config) -> str:
    """sha256 of the resolved configuration, independent of key order; who follows the run (trackers) is left out."""
    tree = config.model_dump(mode="json", exclude={"records": {"trackers", "wandb_mode"}})
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def config_yaml(config: Config) -> str:
    """The resolved configuration as YAML: reading it back gives the same `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted keys: ``{"control.split": 0.25}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def value_text(value: Any) -> str:
    """A value as the user writes it in YAML: ``null``, ``true``, ``[1.0, 0.5]``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {value_text(one)}' for key, one in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value)
