"""Every setting: what it may be, and what is said when it is not."""

from pathlib import Path

import pytest

from kvcached_core.config import (
    CUDA,
    HOST,
    PREFIX,
    Config,
    Enable,
    WeightsMode,
    read_config,
    read_switch,
)
from kvcached_core.errors import ConfigError
from kvcached_core.units import MIB

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_nothing_set_means_half_the_memory_and_no_limit() -> None:
    config = read_config({})
    assert config.host_pool_bytes(24 * MIB) == 12 * MIB
    assert config.limit_bytes(12 * MIB) is None
    assert config.virtual_bytes(12 * MIB) == 12 * MIB


def test_values_are_read_in_the_units_people_write() -> None:
    config = read_config(
        {
            "KVCACHED_HOST_POOL": "512MiB",
            "KVCACHED_LIMIT": "50%",
            "KVCACHED_PAGE_BYTES": "4MiB",
            "KVCACHED_DEBUG": "1",
            "KVCACHED_NAME": "llama-3.1_8b",
            "HOME": "/not/ours",
        }
    )
    pool_bytes = config.host_pool_bytes(1)
    assert (config.virtual_bytes(pool_bytes), config.page_bytes) == (256 * MIB, 4 * MIB)
    assert config.debug
    assert config.name == "llama-3.1_8b"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("HOST_POOL", "lots", "24GiB"),
        ("HOST_POOL", "0", "greater than 0"),
        ("HOST_POOL", "-1GiB", "24GiB"),
        ("LIMIT", "150%", "share such as 50%"),
        ("HEADROOM", "-1", "share such as 50%"),
        ("PAGE_BYTES", "7", "4096"),
        ("MIN_SPARE_PAGES", "-1", "greater than or equal to 0"),
        ("MAX_SPARE_PAGES", "many", "integer"),
        ("DEBUG", "maybe", "boolean"),
        ("WEIGHTS", "drop", "'keep' or 'yield'"),
        ("WEIGHTS_KEPT_SECONDS", "-1", "greater than or equal to 0"),
        ("HOST_BUDGET", "much", "share such as 50%"),
        ("SLEEP_AFTER", "-1", "greater than or equal to 0"),
        ("IDLE_SECONDS", "inf", "less than or equal to 1000000000"),
        ("SLEEP_AFTER", "1e12", "less than or equal to 1000000000"),
        ("WEIGHTS_KEPT_SECONDS", "inf", "less than or equal to 1000000000"),
        ("SLEEP_AFTER", "never", "as a number, or none"),
        ("WEIGHTS_KEPT_SECONDS", "always", "as a number, or auto"),
        ("FLOOR", "lots", "share such as 50%, or none"),
        ("DIR", "~/kv", "path of a folder"),
        ("DIR", "", "path of a folder"),
        ("WEIGHTS_DIR", "", "path of a folder"),
        ("WEIGHTS_DISK", "~", "path of a folder; '~' is not expanded, or none"),
        ("NAME", "../etc", "letters, digits"),
        ("NAME", "", "letters, digits"),
    ],
)
def test_a_bad_value_is_refused_with_variable_value_and_what_is_allowed(
    name: str, value: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config({PREFIX + name: value})
    assert PREFIX + name in str(caught.value)
    assert value in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize("word", ["none", "None", " NONE "])
def test_a_word_means_the_default_in_every_spelling(word: str) -> None:
    names = ("LIMIT", "FLOOR", "SLEEP_AFTER", "WEIGHTS_DISK")
    told = {PREFIX + name: word for name in names} | {"KVCACHED_WEIGHTS_KEPT_SECONDS": "Auto"}
    assert read_config(told) == read_config({})


def test_a_misspelt_variable_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"KVCACHED_LIMTI is not.*did you mean KVCACHED_LIMIT"):
        read_config({"KVCACHED_LIMTI": "1GiB"})


def test_a_share_that_makes_no_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="KVCACHED_HOST_POOL='0%' is not allowed"):
        read_config({"KVCACHED_HOST_POOL": "0%"}).host_pool_bytes(1024 * MIB)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="LIMIT=2 GiB is above what all instances share, 1 GiB"):
        read_config({"KVCACHED_LIMIT": "2GiB"}).limit_bytes(1024 * MIB)
    with pytest.raises(ConfigError, match="MAX_SPARE_PAGES=0 is below"):
        read_config({"KVCACHED_MAX_SPARE_PAGES": "0", "KVCACHED_MIN_SPARE_PAGES": "2"})


def test_watermarks_depend_on_the_device_unless_they_are_set() -> None:
    assert read_config({}).spare_pages(HOST) == (1, 1)
    assert read_config({}).spare_pages(CUDA) == (4, 16)
    assert read_config({"KVCACHED_MIN_SPARE_PAGES": "32"}).spare_pages(CUDA) == (32, 32)
    assert read_config({"KVCACHED_MAX_SPARE_PAGES": "2"}).spare_pages(CUDA) == (2, 2)


def test_a_headroom_is_a_size_or_a_share_of_the_device() -> None:
    assert read_config({}).headroom_bytes(1000 * MIB) == 20 * MIB
    assert read_config({"KVCACHED_HEADROOM": "3MiB"}).headroom_bytes(1000 * MIB) == 3 * MIB


def test_weights_stay_and_copies_lie_beside_the_ledgers_unless_it_is_set() -> None:
    config = read_config({"KVCACHED_DIR": "/home/other"})
    assert config.weights is WeightsMode.KEEP
    assert config.copies_dir == Path("/home/other/weights")
    assert config.sleep_after is None
    assert config.host_budget_bytes(1000 * MIB) == 500 * MIB
    config = read_config(
        {
            "KVCACHED_WEIGHTS": "yield",
            "KVCACHED_WEIGHTS_DIR": "/models/copies",
            "KVCACHED_HOST_BUDGET": "3GiB",
            "KVCACHED_SLEEP_AFTER": "30",
        }
    )
    assert config.weights is WeightsMode.YIELD
    assert config.copies_dir == Path("/models/copies")
    assert config.host_budget_bytes(1) == 3072 * MIB
    assert config.sleep_after == 30


@pytest.mark.parametrize(("text", "switch"), [("1", Enable.ON), ("AUTO", Enable.AUTO)])
def test_the_switch_is_read(text: str, switch: Enable) -> None:
    assert read_switch({"ENABLE_KVCACHED": text}) is switch
    assert read_switch({}) is Enable.OFF


def test_another_switch_is_refused() -> None:
    with pytest.raises(ConfigError, match="ENABLE_KVCACHED='yes' is not allowed; use 0, 1 or auto"):
        read_switch({"ENABLE_KVCACHED": "yes"})


def test_every_setting_is_in_the_documented_table() -> None:
    table = DOCS.read_text()
    missing = [name for name in Config.model_fields if f"`{PREFIX}{name.upper()}`" not in table]
    assert missing == []
