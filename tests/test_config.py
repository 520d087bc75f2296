"""Settings: order, spellings, limits, and that code, broker.toml and README say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from shmbroker import config
from shmbroker.config import Config, load
from shmbroker.errors import ConfigError

CONFIG = Path(__file__).parents[1] / "config"


def write(directory: Path, text: str) -> None:
    (directory / "broker.toml").write_text(text)


def test_argument_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    arguments: dict[str, object] = {}

    def interval() -> int:
        return load(tmp_path, arguments=arguments, environment=environment).runtime.flush_interval_ms

    assert interval() == 500
    write(tmp_path, "flush_interval_ms = 400")
    assert interval() == 400
    environment["SHMBROKER_FLUSH_INTERVAL_MS"] = "300"
    assert interval() == 300
    arguments["flush_interval"] = 0.2
    assert interval() == 200


def test_a_file_given_instead_of_the_directorys_must_exist(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    with pytest.raises(ConfigError, match=r"other\.toml: No such file"):
        load(tmp_path, other)
    write(tmp_path, "send_timeout_ms = 1")
    other.write_text("send_timeout_ms = 2")
    assert load(tmp_path, other, environment={}).runtime.send_timeout_ms == 2


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ('flushDiskType = "SYNC_FLUSH"', "flush_disk_type", "SYNC_FLUSH"),
        ("syncFlushTimeout = 1234", "sync_flush_timeout_ms", 1234),
        ("sendMsgTimeout = 2000", "send_timeout_ms", 2000),
        ("maxMessageSize = 65536", "max_message_bytes", 65536),
        ("defaultTopicQueueNums = 8", "default_topic_queues", 8),
        ("autoCreateTopicEnable = false", "auto_create_topics", False),
        ("flushIntervalCommitLog = 100", "flush_interval_ms", 100),
        ("flushCommitLogLeastPages = 2", "flush_least_bytes", 8192),
        ("mappedFileSizeCommitLog = 134217728", "segment_bytes", 128 * config.MIB),
        ('ring_bytes = "16 MiB"', "ring_bytes", 16 * config.MIB),
        ("disk_full_watermark = 1", "disk_full_watermark", 1.0),
        ('messageDelayLevel = "1s 2s 1h"', "message_delay_level", "1s 2s 1h"),
    ],
)
def test_a_setting_may_be_spelt_as_people_know_it(tmp_path: Path, text: str, key: str, value: object) -> None:
    write(tmp_path, text)
    assert load(tmp_path, environment={}).as_dict()[key] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ring_bytes": 3 * config.MIB},
            "ring_bytes = 3145728: must be an integer, 65536 to 2147483648, a power of two",
        ),
        ({"ring_bytes": "much"}, "ring_bytes = 'much': must be an integer"),
        ({"segment_bytes": 65537}, "segment_bytes = 65537: .* a multiple of 4096"),
        ({"ring_bytes": "4M"}, 'a power of two; as text: .* one of B, KiB, MiB, .*, as in "4 MiB"$'),
        ({"ring_bytes": "4 MB?"}, 'one of B, KiB, MiB, GiB, KB, MB, GB, as in "4 MiB"$'),
        ({"ring_bytes": "8 MB"}, 'a power of two; 8 MB is a decimal size: did you mean "8 MiB"\\?$'),
        ({"sync_flush_timeout": "5"}, "^sync_flush_timeout = '5': must be a number of seconds, 0.001 to 3600$"),
        ({"sync_flush_timeout": float("nan")}, "sync_flush_timeout = nan"),
        ({"send_timeout": 0}, "^send_timeout = 0: must be a number of seconds, 0.001 to 3600$"),
        (
            {"auto_create_topics": "on"},
            "auto_create_topics = 'on': must be true or false; as text: true, yes, 1 or false, no, 0",
        ),
        ({"max_topics": True}, "max_topics = True: must be an integer"),
        ({"flush_disk_type": "sync"}, "flush_disk_type = 'sync': must be ASYNC_FLUSH or SYNC_FLUSH"),
        ({"disk_full_watermark": float("nan")}, "disk_full_watermark = nan: must be a number, 0.1 to 1"),
        ({"flushDiskTypo": "SYNC_FLUSH"}, "unknown setting 'flushDiskTypo'"),
        (
            {"ring_bytes": "1 MiB", "max_message_bytes": "1 MiB"},
            r"1048576: a message fills at most a quarter of ring_bytes \(1 MiB\), its header included",
        ),
        (
            {"ring_bytes": "1 MiB", "max_message_bytes": "1 MiB"},
            'at most 262064 bytes of body; this size takes ring_bytes = "8 MiB"$',
        ),
        (
            {"max_message_bytes": "16 MiB"},
            r"segment_bytes \(64 MiB\).* 8388528 .* ring_bytes = .128 MiB. and segment_bytes = .128 MiB.$",
        ),
        ({"max_message_bytes": "1 GiB"}, "at most 8388528 bytes of body$"),
        ({"snapshot_interval_bytes": "128 MiB"}, "snapshot_interval_bytes = 134217728: must be at most segment_bytes"),
        (
            {"message_delay_level": "1s soon"},
            "message_delay_level = '1s soon': delay 'soon': a number and ms, s, m, h or d",
        ),
        ({"maxMessageSize": 1, "max_message_bytes": 1}, "another spelling of 'max_message_bytes'"),
    ],
)
def test_a_wrong_setting_is_refused_with_key_value_and_limits(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(arguments=arguments, environment={})


def test_the_sizes_that_an_error_proposes_are_accepted() -> None:
    for size in ("8 MiB", "16 MiB", "300 MB", "262065"):
        with pytest.raises(ConfigError) as refused:
            load(arguments={"ring_bytes": "1 MiB", "segment_bytes": "1 MiB", "max_message_bytes": size}, environment={})
        proposed = dict(re.findall(r'(\w+) = "(.+?)"', str(refused.value)))
        assert list(proposed) == ["ring_bytes", "segment_bytes"]
        load(arguments=proposed | {"max_message_bytes": size}, environment={})


def test_the_texts_that_mean_true_and_false_are_accepted_and_documented() -> None:
    documents = [CONFIG / "README.md", CONFIG.parent / "docs" / "operations.md"]
    for text, value in config._BOOLEANS.items():
        for spelt in (text, text.title(), text.upper()):
            assert load(environment={"SHMBROKER_AUTO_CREATE_TOPICS": spelt}).runtime.auto_create_topics is value
    for document in documents:
        words = document.read_text().replace("\n", " ")
        assert "`true`, `yes`, `1` or `false`, `no`, `0`" in words, document


def test_a_time_in_a_file_needs_its_unit(tmp_path: Path) -> None:
    write(tmp_path, "sync_flush_timeout = 5")
    with pytest.raises(ConfigError, match="did you mean sync_flush_timeout_ms, in milliseconds"):
        load(tmp_path, environment={})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("SHMBROKER_RINGBYTES", "SHMBROKER_RINGBYTES: unknown variable; did you mean SHMBROKER_RING_BYTES?"),
        ("SHMBROKER_FLUSH_TYPE", "did you mean SHMBROKER_FLUSH_DISK_TYPE?"),
        ("SHMBROKER_SYNC_FLUSH_TIMEOUT", "did you mean SHMBROKER_SYNC_FLUSH_TIMEOUT_MS, in milliseconds?"),
        ("SHMBROKER_FLUSHDISKTYP", "did you mean SHMBROKER_FLUSHDISKTYPE?"),
        ("SHMBROKER_DIRECTRY", "did you mean SHMBROKER_DIRECTORY?"),
        ("SHMBROKER_directory", "did you mean SHMBROKER_DIRECTORY?"),
        ("SHMBROKER_XYZ", "unknown variable; config/README.md lists them all"),
    ],
)
def test_a_misspelt_variable_is_refused_with_what_was_meant(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(hint)):
        load(environment={name: "1"})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ring_bytes", "3 MiB", "ring_bytes = 3145728: must be an integer, 65536 to "),
        ("flushDiskType", "SYNC", "flush_disk_type = 'SYNC': must be ASYNC_FLUSH or SYNC_FLUSH"),
        ("disk_full_watermark", "much", "disk_full_watermark = 'much': must be a number, "),
        ("message_delay_level", "1s soon", "message_delay_level = '1s soon': delay 'soon': "),
    ],
)
def test_a_wrong_value_is_refused_with_the_variable_or_the_file_that_has_it(
    tmp_path: Path, name: str, value: str, told: str
) -> None:
    variable = f"SHMBROKER_{name.upper()}"
    with pytest.raises(ConfigError, match=f"^{variable}: {re.escape(told)}"):
        load(environment={variable: value})
    write(tmp_path, f"{name} = {value!r}")
    with pytest.raises(ConfigError, match=f"^{tmp_path}/broker.toml: {re.escape(told)}"):
        load(tmp_path, environment={})


def test_a_wrong_value_that_another_place_overrules_is_none(tmp_path: Path) -> None:
    write(tmp_path, "ring_bytes = 3")
    environment = {"SHMBROKER_RING_BYTES": "1 MiB"}
    assert load(tmp_path, environment=environment).layout.ring_bytes == config.MIB


@pytest.mark.parametrize("name", ["FLUSHDISKTYPE", "flushDiskType", "flush_disk_type", "FLUSH_DISK_TYPE"])
def test_a_variable_may_be_spelt_as_people_know_it(name: str) -> None:
    assert load(environment={f"SHMBROKER_{name}": "SYNC_FLUSH"}).sync_flush


def test_variables_that_are_no_settings_are_left_alone() -> None:
    """Ours, each of which the code names; and those of a Kubernetes service that is called shmbroker-orders."""
    sources = [path for top in ("shmbroker", "workers", "tools") for path in (CONFIG.parent / top).rglob("*.py")]
    ours = {name for path in sources for name in re.findall(r'"SHMBROKER_(\w+)"', path.read_text())}
    assert ours == config.OTHER_VARIABLES
    theirs = {"ORDERS_SERVICE_HOST", "ORDERS_SERVICE_PORT_HTTP", "ORDERS_PORT", "PORT", "ORDERS_PORT_80_TCP_ADDR"}
    assert load(environment=dict.fromkeys((f"SHMBROKER_{name}" for name in ours | theirs), "1")) == Config()


def test_a_file_that_is_no_toml_is_refused_with_its_name(tmp_path: Path) -> None:
    write(tmp_path, "flush_interval_ms: 5")
    with pytest.raises(ConfigError, match=r"broker\.toml"):
        load(tmp_path, environment={})


def test_defaults_that_a_small_ring_cannot_hold_follow_it_down() -> None:
    small = load(arguments={"ring_bytes": "1 MiB", "segment_bytes": "2 MiB"}, environment={})
    assert small.layout.max_message_bytes == 256 * config.KIB - config.RECORD_HEADER_BYTES
    assert small.runtime.snapshot_interval_bytes == 2 * config.MIB


def test_a_configuration_survives_its_way_through_the_descriptor() -> None:
    chosen = load(
        arguments={"flush_disk_type": "SYNC_FLUSH", "ring_bytes": "1 MiB", "embed_grace": 0.25}, environment={}
    )
    assert Config.of(chosen.as_dict()) == chosen
    assert Config.of(chosen.chosen_settings()) == chosen
    assert chosen.given == {"flush_disk_type", "ring_bytes", "embed_grace_ms"}


@pytest.mark.parametrize(
    ("settings", "visible"),
    [
        ({}, "append"),
        ({"flush_disk_type": "SYNC_FLUSH"}, "flush"),
        ({"flush_disk_type": "SYNC_FLUSH", "visible_after": "append"}, "append"),
    ],
)
def test_consumers_see_what_is_as_durable_as_send_ok_says(settings: dict[str, object], visible: str) -> None:
    assert Config.of(settings).visible_after == visible


@pytest.mark.parametrize(
    "settings", [{"broker_role": "SYNC_MASTER"}, {"brokerRole": "SYNC_MASTER"}, {"visible_after": "replicate"}]
)
def test_what_needs_a_slave_is_refused_until_there_is_replication(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="replication comes with a later version"):
        load(arguments=settings, environment={})


def test_the_defaults_fit_into_48_mib_of_memory() -> None:
    from shmbroker._native._core import Region

    defaults = Config()
    assert sum(Region.sizes(defaults.native_limits(), defaults.layout.ring_bytes)) <= 48 * config.MIB


def test_broker_toml_holds_every_key_with_its_default() -> None:
    keys = list(tomllib.loads((CONFIG / "broker.toml").read_text()))
    assert keys == list(config.RULES)
    assert load(file=CONFIG / "broker.toml", environment={}) == Config()


def test_the_readme_has_a_row_for_every_key_with_default_limits_and_meaning() -> None:
    rows = {}
    for line in (CONFIG / "README.md").read_text().splitlines():
        if match := re.fullmatch(r"\| `(\w+)` \| `([^`]*)` \| (.+?) \| (.*?) \| (.+) \| (.+) \|", line):
            rows[match[1]] = match.groups()[1:]
    assert list(rows) == list(config.RULES)
    spellings = {ours: theirs for theirs, (ours, _) in config.ROCKETMQ_KEYS.items()}
    for key, (default, limits, spelling, meaning, _changed) in rows.items():
        assert load(arguments={}, environment={f"SHMBROKER_{key.upper()}": default}) == Config(), key
        assert limits == config.limits_text(key), key
        assert meaning == config.RULES[key].meaning, key
        assert spelling.split("`")[1::2] == ([spellings[key]] if key in spellings else []), key
