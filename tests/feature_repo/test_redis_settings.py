from __future__ import annotations

import pickle

import pytest

from feature_repo.redis_settings import RedisSettings, chosen_redis, redis_settings
from models.errors import InputError

SECRET = "correct-horse"
URL = "redis://cache.example:6379/0"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    for field in RedisSettings.model_fields:
        monkeypatch.delenv(f"VQL_REDIS_{field.upper()}", raising=False)


def test_settings_come_from_the_environment_and_the_password_from_its_file(monkeypatch, tmp_path):
    (tmp_path / "password").write_text(f"{SECRET}\n")
    (tmp_path / "ca.pem").write_text("a certificate")
    for name, value in {
        "URL": "rediss://cache.example:6379/2",
        "USERNAME": "streamer",
        "PASSWORD_FILE": tmp_path / "password",
        "SSL_CA_FILE": tmp_path / "ca.pem",
        "TIMEOUT_S": "2.5",
    }.items():
        monkeypatch.setenv(f"VQL_REDIS_{name}", str(value))
    assert chosen_redis().client() == {
        "username": "streamer",
        "password": SECRET,
        "ssl_ca_certs": str(tmp_path / "ca.pem"),
        "socket_timeout": 2.5,
        "socket_connect_timeout": 2.5,
    }


@pytest.mark.parametrize("value", [None, ""])
def test_without_an_address_redis_is_not_chosen(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("VQL_REDIS_URL", value)
    assert chosen_redis() is None


def test_the_password_is_in_nothing_that_is_printed_or_sent(tmp_path):
    (tmp_path / "password").write_text(SECRET)
    settings = redis_settings(url=URL, password_file=tmp_path / "password")
    settings.client()
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.model_dump())
    assert SECRET.encode() not in pickle.dumps(settings)


@pytest.mark.parametrize(
    "url", [f"redis://u:{SECRET}@cache.example:6379", f"redis://:{SECRET}@cache.example", f"{URL}?password={SECRET}"]
)
def test_an_address_with_a_password_in_it_is_refused_and_not_repeated(url):
    with pytest.raises(InputError, match=r"VQL_REDIS_URL: .*VQL_REDIS_PASSWORD_FILE") as caught:
        redis_settings(url=url)
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__


def test_settings_are_the_same_settings_after_their_way_to_a_worker():
    settings = redis_settings(url=URL, ttl_s=60)
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert hash(pickle.loads(pickle.dumps(settings))) == hash(settings)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "VQL_REDIS_URL: Field required"),
        ({"url": "cache.example:6379"}, "VQL_REDIS_URL: .*it must be redis://host:port/database"),
        ({"url": "redis://"}, "VQL_REDIS_URL: .*it must be redis://host:port/database"),
        ({"url": URL, "ttl_s": 0}, "VQL_REDIS_TTL_S: Input should be greater than 0"),
        ({"url": URL, "timeout_s": -1}, "VQL_REDIS_TIMEOUT_S"),
        ({"url": URL, "retries": -1}, "VQL_REDIS_RETRIES"),
        ({"url": URL, "username": "streamer"}, "a user name needs VQL_REDIS_PASSWORD_FILE"),
        ({"url": URL, "ssl_ca_file": "ca.pem"}, "VQL_REDIS_SSL_CA_FILE needs a rediss:// address"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_the_name_of_their_variable(given, words):
    with pytest.raises(InputError, match=words):
        redis_settings(**given)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    nowhere = tmp_path / "nowhere"
    for settings in (
        redis_settings(url=URL, password_file=nowhere),
        redis_settings(url=URL.replace("redis:", "rediss:"), ssl_ca_file=nowhere),
    ):
        with pytest.raises(InputError, match=f"{nowhere}.*cannot be read"):
            settings.client()
