"""What users write into YAML files: each key once, and one sentence for whatever cannot be read."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.cost.device import load_profile
from fedsim.errors import ConfigError, FedsimError, ProfileError
from fedsim.fleet.fleet_file import read_fleet_file
from fedsim.resources import resource_folder
from fedsim.runner.config import read_tree
from fedsim.yaml_text import YamlError, read_yaml

UNREADABLE = {
    "a list as a key": ("? [1, 2]\n: 3\n", "list or mapping as a key"),
    "a mapping as a key": ("a: {? {b: 1} : 2}", "list or mapping as a key"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", r"key 'a' is there twice.*line 3"),
    "a key twice, inside": ("a:\n  b: 1\n  b: 1\n", r"key 'b' is there twice.*line 3"),
    "a key twice, quoted": ("a: 1\n'a': 2\n", "key 'a' is there twice"),
    "deep": ("a: " + "[" * 3000 + "]" * 3000, "nested more than"),
    "deep mappings": ("{a: " * 3000 + "1" + "}" * 3000, "nested more than"),
    "within itself": ("a: &a [*a]", "holds itself"),
    "no such day": ("a: 2001-02-30", "cannot be read"),
    "many digits": ("a: 1" + "0" * 5000, "cannot be read"),
    "a tag's nonsense": ("a: !!bool perhaps", "cannot be read"),
    "code": ("a: !!python/object/apply:os.getcwd []", "constructor"),
    "two documents": ("a: 1\n---\nb: 2\n", "document"),
    "a null character": ("a: \x00", "control characters|unacceptable"),
}


@pytest.mark.parametrize(("text", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_one_sentence(text, said, tmp_path):
    with pytest.raises(YamlError, match=said) as caught:
        read_yaml(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    file = tmp_path / "x.yaml"
    file.write_text(text)
    for read, kind in ((read_tree, ConfigError), (read_fleet_file, ProfileError), (load_profile, ProfileError)):
        with pytest.raises(kind, match=r"x\.yaml"):
            read(file)


def test_aliases_do_not_multiply():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(12))
    with pytest.raises(YamlError, match="aliases"):
        read_yaml(bomb)
    assert read_yaml("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}


def test_numbers_keys_and_merges():
    assert read_yaml("a: 1e-3\nb: 2E5\n5W: .5\n") == {"a": 1e-3, "b": 2e5, "5W": 0.5}
    assert read_yaml("1: a\ntrue: b\n1e3: c\n") == {"1": "a", "true": "b", "1e3": "c"}
    assert read_yaml("base: &b {x: 1, y: 2}\nown: {<<: *b, y: 3}\n")["own"] == {"x": 1, "y": 3}
    assert math.isinf(read_yaml("a: .inf")["a"])
    assert read_yaml("") is None


@given(st.text(alphabet="ab:{}[]-?,&*!<>|'\"#%@\n 01e.~=", max_size=40))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(YamlError):  # and nothing else
        read_yaml(text)


def test_profile_and_fleet_with_a_key_twice(tmp_path):
    profile = tmp_path / "mine.yaml"
    original = (resource_folder("device_profiles") / "jetson-tx2.yaml").read_text()
    profile.write_text(original + "\nidle_power: {value: 90, unit: W, status: assumed, source: typo}\n")
    with pytest.raises(ProfileError, match="'idle_power' is there twice"):
        load_profile(profile)


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e300", ".inf", "1e-300", "true", "'9'"])
def test_numbers_that_no_device_has(tmp_path, number):
    original = (resource_folder("device_profiles") / "jetson-tx2.yaml").read_text()
    profile = tmp_path / "mine.yaml"
    profile.write_text(original.replace("launch_cost: {value: 0.081", f"launch_cost: {{value: {number}"))
    assert profile.read_text() != original
    with pytest.raises(FedsimError, match="launch_cost has value") as caught:
        load_profile(profile)
    assert len(str(caught.value)) < 400
