"""The configuration: one set of keys in JSON, TOML and Python, and errors that name the key."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvmarket.core import config
from vllm_kvmarket.core.config import MarketConfig, load, to_mapping
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.core.pricing import INT64_MAX, PPM, Tariff

KEYS = {"home": "/srv/market", "chunk_tokens": 512, "tariff": {"royalty_ppm": 250_000}}
AS_TOML = 'home = "/srv/market"\nchunk_tokens = 512\n[tariff]\nroyalty_ppm = 250_000\n'
EXPECTED = MarketConfig(home="/srv/market", chunk_tokens=512, tariff=Tariff(royalty_ppm=250_000))

WRONG = [
    ({"tarif": {}}, "unknown configuration key 'tarif'; did you mean 'tariff'?"),
    (
        {"tariff": {"royalty_pm": 3}},
        "unknown configuration key 'tariff.royalty_pm'; did you mean 'tariff.royalty_ppm'?",
    ),
    (
        {"royalty_ppm": 3},
        "unknown configuration key 'royalty_ppm'; did you mean 'tariff.royalty_ppm'?",
    ),
    ({"tariff": {"royalty_ppm": -3}}, "tariff.royalty_ppm: expected integer >= 0, not -3"),
    (
        {"tariff": {"royalty_ppm": 1_000_001}},
        "tariff.royalty_ppm: expected integer <= 1000000, not 1000001",
    ),
    (
        {"tariff": {"cache_read_nano_per_mtok": -1}},
        "tariff.cache_read_nano_per_mtok: expected integer >= 0, not -1",
    ),
    (
        {"tariff": {"input_nano_per_mtok": 2**63}},
        f"tariff.input_nano_per_mtok: expected integer <= {INT64_MAX}, not {2**63}",
    ),
    (
        {"tariff": {"input_nano_per_mtok": 1.5}},
        "tariff.input_nano_per_mtok: expected integer, not 1.5",
    ),
    ({"tariff": 3}, "tariff: expected an object, not 3"),
    ({"home": ""}, 'home: expected a text that is not empty, not ""'),
    ({"home": 3}, "home: expected string, not 3"),
    ({"chunk_tokens": 100}, "chunk_tokens: expected a power of two, not 100"),
    ({"chunk_tokens": 8}, "chunk_tokens: expected integer >= 16, not 8"),
    ({"chunk_tokens": 8192}, "chunk_tokens: expected integer <= 4096, not 8192"),
    ({"chunk_tokens": "256"}, 'chunk_tokens: expected integer, not "256"'),
    (
        {"state_every_tokens": 300},
        "state_every_tokens: expected a multiple of chunk_tokens, 256, below 16777216, not 300",
    ),
    (
        {"state_every_tokens": 2**24},
        "state_every_tokens: expected a multiple of chunk_tokens, 256, below 16777216, not "
        "16777216",
    ),
    (
        {"without_account": "sell"},
        'without_account: expected "recompute" or "free", not "sell"',
    ),
    ({"trust_requests": 1}, "trust_requests: expected boolean or null, not 1"),
    ({"refresh_interval_s": float("nan")}, "refresh_interval_s: expected number > 0.0, not NaN"),
    ({"io_threads": True}, "io_threads: expected integer, not true"),
    ({1: 2}, 'configuration: expected an object, not {"1": 2}'),
]


def test_nothing_at_all_gives_the_defaults(monkeypatch):
    """A market needs no configuration: prices, sizes and home have defaults."""
    monkeypatch.setenv("KVMARKET_HOME", "/srv/elsewhere")
    assert load(None) == load({}) == MarketConfig()
    assert load().home == "/srv/elsewhere"
    assert load().tariff == Tariff()


def test_the_home_follows_the_data_directory_where_no_variable_names_it(monkeypatch, tmp_path):
    """$KVMARKET_HOME comes first, then $XDG_DATA_HOME, then ~/.local/share; empty is unset."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KVMARKET_HOME", "")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert load().home == str(tmp_path / ".local" / "share" / "kvmarket")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert load().home == "/data/kvmarket"


def test_the_same_keys_work_in_json_toml_and_python(tmp_path):
    """A mapping, a JSON text, a JSON file, a TOML file and the Python object say the same."""
    (tmp_path / "market.json").write_text(json.dumps(KEYS))
    (tmp_path / "market.toml").write_text(AS_TOML)
    sources = [KEYS, json.dumps(KEYS), tmp_path / "market.json", str(tmp_path / "market.toml")]
    assert [load(source) for source in [*sources, EXPECTED]] == [EXPECTED] * 5


@pytest.mark.parametrize(("source", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_key_or_value_is_one_line_that_names_the_key(source, message):
    """The error says which key is wrong, what it takes, and what it was given."""
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert str(caught.value) == message


def test_an_unknown_key_like_no_other_lists_the_known_ones():
    """Where nothing is near, the message lists what there is."""
    with pytest.raises(ConfigError, match="'zzzzzz'; known keys: home, chunk_tokens, "):
        load({"zzzzzz": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "a.json is not valid JSON"),
        ("a.json", b"[1]", r"a.json must be a JSON object, not \[1\]"),
        ("a.toml", b"home = ", "a.toml is not valid TOML"),
        ("a.toml", b"\xff\xfe", "cannot read the configuration .*a.toml.*utf-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    """A malformed file gives an error with its name, not a traceback."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("source", ["{", "[1]", "/no/such/file.toml", "/", "a\0b", "x" * 5000])
def test_a_text_that_is_neither_json_nor_a_file_is_an_error_of_one_line(source):
    """Any wrong value of --config is one ConfigError."""
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_an_object_that_was_built_with_wrong_values_is_refused_too():
    """Python's constructor checks no types, so load does."""
    with pytest.raises(ConfigError, match=r"tariff\.royalty_ppm: expected integer <= 1000000"):
        load(MarketConfig(tariff=Tariff(royalty_ppm=PPM + 1)))
    with pytest.raises(ConfigError, match="chunk_tokens: expected a power of two"):
        MarketConfig(chunk_tokens=300)


prices = st.integers(0, INT64_MAX)
configs = st.builds(
    MarketConfig,
    home=st.text(min_size=1),
    chunk_tokens=st.sampled_from([16, 64, 256, 4096]),
    tariff=st.builds(
        Tariff,
        input_nano_per_mtok=prices,
        cache_read_nano_per_mtok=st.none() | prices,
        cache_write_nano_per_mtok=prices,
        output_nano_per_mtok=st.none() | prices,
        royalty_ppm=st.integers(0, PPM),
    ),
    without_account=st.sampled_from(["recompute", "free"]),
    trust_requests=st.none() | st.booleans(),
    refresh_interval_s=st.floats(0.01, 60),
    index_folder=st.none() | st.text(),
)


@given(configs)
def test_a_configuration_survives_the_way_through_json(chosen):
    """load() reads what to_mapping() gives, also as JSON from another process."""
    assert load(to_mapping(chosen)) == chosen
    assert load(json.dumps(to_mapping(chosen))) == chosen


def test_the_table_documents_every_key_once():
    """Each key of the code, the tariff's with their prefix, has a type and a meaning."""
    expected = [field for field in MarketConfig.__struct_fields__ if field != "tariff"]
    expected += [f"tariff.{field}" for field in Tariff.__struct_fields__]
    described = config.describe()
    assert sorted(key for key, *_ in described) == sorted(expected)
    assert all(kind and meaning for _, kind, _, meaning in described)
    assert ("chunk_tokens", "integer", "256") in [row[:3] for row in described]


def test_the_documented_defaults_are_the_defaults():
    """Every default in the table is the one that load gives."""
    mapping = to_mapping(load())
    for key, _, default, _ in config.describe():
        if default:
            room, _, name = key.rpartition(".")
            value = (mapping[room] if room else mapping)[name]
            assert msgspec.json.decode(default) == value, key


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://market:s3cret@db/market",
        "postgresql://market:@db/market",
        "postgresql://market@db/market?password=s3cret",
        "host=db user=market password=s3cret",
        "postgresql://[market:s3cret@db",
    ],
)
def test_a_password_in_the_ledgers_url_is_refused(url):
    """With a hint at the file for it, and without showing it."""
    with pytest.raises(ConfigError, match="PGPASSFILE") as refused:
        load({"ledger_url": url})
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["secret_access_key", "AWS_SESSION_TOKEN", "account_key", "sas_token", "service_account_key"],
)
def test_a_secret_of_the_object_store_is_refused(name):
    """With a hint at the environment, and without showing it."""
    with pytest.raises(ConfigError, match="environment") as refused:
        load({"object_store_options": {"endpoint": "http://s3", name: "s3cret"}})
    assert "s3cret" not in str(refused.value)


def test_what_is_no_secret_of_the_object_store_is_taken():
    """Also names that look a little like one."""
    options = {"sse_kms_key_id": "k", "access_key_id": "me", "credentials_file": "/c.json"}
    assert load({"object_store_options": options}).object_store_options == options


@pytest.mark.parametrize(
    "url", ["postgresql://market@db/market", "postgresql://market@/m?host=/run/pg&port=5433"]
)
def test_a_url_without_a_password_is_taken(url):
    """The password comes from PGPASSFILE, or the server needs none."""
    assert load({"ledger_url": url}).ledger_url == url
