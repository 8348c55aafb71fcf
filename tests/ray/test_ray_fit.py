"""A Ray that is not the locked one is refused before anything of it is used."""

from pathlib import Path

import pytest

from kvcached_core.errors import ConfigError
from kvcached_patches.engines import RAY
from kvcached_patches.policy import Installed
from kvcached_ray import fit


def test_another_release_is_refused_with_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Installed("ray", "2.99.0", tmp_path)
    monkeypatch.setattr(type(RAY), "installed", lambda _self: found)
    with pytest.raises(ConfigError, match=r"Ray 2\.99\.0 is not served, only 2\.60\.0"):
        fit.check_ray()


def test_no_ray_is_refused_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(RAY), "installed", lambda _self: None)
    with pytest.raises(ConfigError, match=r"kvcached-elastic\[ray\]"):
        fit.check_ray()


def test_the_installed_ray_is_the_locked_one() -> None:
    fit.check_ray()
