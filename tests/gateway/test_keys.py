"""Clients' keys: only hashes are kept, every one is compared, and a broken file changes nothing."""

import hashlib
import hmac
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.errors import ConfigError
from kvcached_gateway.settings.config import ModelSettings, ServiceClass, Settings
from kvcached_gateway.settings.keys import Key, Keys, KeysFile


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def of(*names: str) -> Keys:
    return Keys(tuple(Key(name=name, sha256=digest(f"secret of {name}")) for name in names))


def test_a_key_is_read_with_what_it_may_do(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f"alice: {{sha256: {digest('a').upper()}, models: [llama], class: chat, "
        f"max_concurrent: 4, requests_per_minute: 90, may_set_deadline: true}}\n"
        f"bob: {{sha256: {digest('b')}}}\n",
    )
    alice, bob = Keys.read(path).all
    assert (alice.name, alice.models, alice.class_name) == ("alice", ("llama",), "chat")
    assert (alice.max_concurrent, alice.requests_per_minute) == (4, 90)
    assert (alice.may_set_deadline, bob.may_set_deadline) == (True, False)
    assert (bob.models, bob.class_name, bob.max_concurrent) == (None, None, None)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_is_found_by_its_secret(scheme: str) -> None:
    found = of("alice", "bob").find(f"{scheme} secret of bob")
    assert found is not None
    assert found.name == "bob"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "secret of bob",
        "Basic secret of bob",
        "Bearer secret of bo",
        "Bearer secret of bob!",
        f"Bearer {digest('secret of bob')}",
        "Bearer \udce4",
    ],
)
def test_nothing_else_is_a_key(header: str | None) -> None:
    assert of("alice", "bob").find(header) is None


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_key_is_found_whatever_it_holds(secret: str) -> None:
    keys = Keys((Key(name="one", sha256=digest(secret.strip())),))
    assert keys.find(f"Bearer {secret}") is keys.all[0]


def test_each_key_is_compared_whichever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = of("alice", "bob", "carol")
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for header in ("Bearer secret of alice", "Bearer nobody", "Basic x", None):
        compared.clear()
        keys.find(header)
        assert len(set(compared)) == 3


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("alice: {}", 1, "alice.sha256 is missing"),
        ("alice: {sha256: hush}", 1, "alice.sha256 is no hash; write the SHA-256 of the key"),
        ("\nalice: {sha256: [hush]}", 2, "alice.sha256 is no hash; write text"),
        (f"alice: {{sha256: {'a' * 64}, model: x}}", 1, "alice.model is not a setting; did you me"),
        (
            f"alice: {{sha256: {'a' * 64}, models: x}}",
            1,
            "alice.models='x' is not allowed; write a",
        ),
        (f"alice: {{sha256: {'a' * 64}, models: }}", 1, "alice.models says nothing; write [] for"),
        (
            f"alice: {{sha256: {'a' * 64}, max_concurrent: 0}}",
            1,
            "alice.max_concurrent='0' is not allowed",
        ),
        (
            f"a: {{sha256: {'a' * 64}}}\nb: {{sha256: {'A' * 64}}}",
            2,
            "b.sha256 is that of 'a', too",
        ),
        ("[]", 1, "the file has to be a table"),
    ],
)
def test_a_mistake_is_one_error_that_shows_no_key(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        Keys.read(written(tmp_path, text))
    told = str(raised.value)
    assert f"keys.yaml, line {line}: {message}" in told
    assert "hush" not in told


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path, "")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}; it holds secrets: chmod 600"):
        Keys.read(path)


def test_a_key_shows_no_hash() -> None:
    assert digest("secret of bob") not in repr(of("bob").all)


SETTINGS = Settings(
    path=Path("models.yaml"),
    models={"llama": ModelSettings(id="llama", aliases=("gpt",))},
    classes={"chat": ServiceClass(name="chat")},
)


def test_keys_that_name_what_there_is_not_are_refused() -> None:
    def key(**values: object) -> Keys:
        return Keys((Key.model_validate({"name": "a", "sha256": "0" * 64, **values}),))

    key(models=["llama"], **{"class": "chat"}).check(SETTINGS)
    with pytest.raises(ConfigError, match="'a' names no model 'lama'; did you mean 'llama'"):
        key(models=["lama"]).check(SETTINGS)
    with pytest.raises(ConfigError, match="'a' names no class 'chad'; did you mean 'chat'"):
        key(class_name="chad").check(SETTINGS)


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, f"a: {{sha256: {digest('a')}}}")
    file = KeysFile(path, lambda: SETTINGS)
    assert not file.read_again()
    replace(path, f"b: {{sha256: {digest('b')}}}")
    assert file.read_again()
    assert [key.name for key in file.keys.all] == ["b"]
    for broken in ("b: {", "c: {}"):
        replace(path, broken)
        assert not file.read_again()
        assert [key.name for key in file.keys.all] == ["b"]
    path.unlink()
    assert not file.read_again()
    assert caplog.text.count("the keys of before hold on: ") == 3
    assert not file.read_again()  # and it is said once
    assert caplog.text.count("the keys of before hold on: ") == 3
    replace(path, f"d: {{sha256: {digest('d')}}}")
    assert file.read_again()
    assert file.keys.find("Bearer d") is not None
    assert file.keys.find("Bearer b") is None


def test_keys_that_name_what_there_is_not_wait_for_the_file_of_models(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holding = [SETTINGS]
    path = written(tmp_path, f"a: {{sha256: {digest('a')}, models: [qwen]}}")
    with pytest.raises(ConfigError, match="'a' names no model 'qwen'"):
        KeysFile(path, lambda: holding[0])
    replace(path, f"b: {{sha256: {digest('b')}}}")
    file = KeysFile(path, lambda: holding[0])
    replace(path, f"a: {{sha256: {digest('a')}, models: [qwen]}}")
    assert [file.read_again(), file.read_again()] == [False, False]
    assert caplog.text.count("the keys of before hold on: the key 'a' names no model 'qwen'") == 1
    assert [key.name for key in file.keys.all] == ["b"]
    holding[0] = SETTINGS.model_copy(update={"models": {"qwen": ModelSettings(id="qwen")}})
    assert file.read_again()
    assert [key.name for key in file.keys.all] == ["a"]


def replace(path: Path, text: str) -> None:
    """Put a new file in its place, as editors do; then a stamp of the same time differs, too."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    os.replace(new, path)  # noqa: PTH105  a rename over the other
