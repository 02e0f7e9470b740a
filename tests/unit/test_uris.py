"""Which URIs of a dataset may be asked for: those below a prefix, whatever is tried with dots and names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.errors import ConfigError
from mmray.schema import Status
from mmray.uris import Prefixes, UnfetchedError, Uri, find_address, is_forbidden

PREFIXES = Prefixes.parse(
    ("s3://photos/2026", "https://images.example/public/", "http://images.example:8080")
)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://photos/2026/a.jpg",
        "s3://photos/2026/ä b?c#d%2F..%2F.jpg",
        "S3://photos/2026/a.jpg",
        "https://images.example/public/a.jpg",
        "https://IMAGES.example:443/public/a.jpg?width=3&next=https://elsewhere.example/",
        "https://images.example/public/ein bild.jpg",
        "http://images.example:8080/a.jpg",
    ],
)
def test_what_lies_below_a_prefix_is_allowed(uri):
    assert PREFIXES.allowed(uri).host in ("photos", "images.example")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "a.jpg",
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://images.example/public/a.jpg",
        "data:image/png;base64,AAAA",
        "s3://photos/2025/a.jpg",
        "s3://photos/2026-private/a.jpg",
        "s3://other/2026/a.jpg",
        "https://photos/2026/a.jpg",
        "http://images.example/public/a.jpg",
        "https://images.example/private/a.jpg",
        "https://images.example/publicity/a.jpg",
        "https://images.example/public/../private/a.jpg",
        "https://images.example/public/%2e%2e/private/a.jpg",
        "https://images.example/public/..%2fprivate/a.jpg",
        "https://images.example:8443/public/a.jpg",
        "https://images.example@evil.example/public/a.jpg",
        "https://evil.example\\@images.example/public/a.jpg",
        "https://images.example.evil.example/public/a.jpg",
        "https://images.example:port/public/a.jpg",
        "https://[images.example/public/a.jpg",
        "https:///public/a.jpg",
        "http://169.254.169.254/latest/meta-data/",
    ],
)
def test_what_does_not_is_refused(uri):
    with pytest.raises(UnfetchedError):
        PREFIXES.allowed(uri)


@given(st.text())
def test_no_text_does_more_than_be_refused(text):
    for uri in (text, f"https://images.example/public/{text}", f"https://{text}/public/"):
        try:
            allowed = PREFIXES.allowed(uri)
        except UnfetchedError:
            continue
        assert (allowed.scheme, allowed.host) in (("https", "images.example"), ("s3", "photos"))


@pytest.mark.parametrize("prefix", ["", "photos", "/data", "file:///data", "s3://", "https://", "ftp://host"])
def test_a_prefix_that_names_no_place_is_refused_by_name(prefix):
    with pytest.raises(ConfigError, match="--image-prefix"):
        Prefixes.parse((prefix,))


@pytest.mark.parametrize(
    "prefix", ["https://host/p?sig=SECRET", "https://u:SECRET/w@host", "s3://bucket/p#SECRET"]
)
def test_a_prefix_that_may_hold_a_secret_is_refused_without_repeating_it(prefix):
    with pytest.raises(ConfigError, match="--image-prefix") as raised:
        Prefixes.parse((prefix,))
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    [
        *("168.63.129.16", "64:ff9b::a9fe:a9fe", "::169.254.169.254"),
        *("169.254.169.254", "169.254.170.2", "fe80::1%eth0", "::ffff:169.254.169.254"),
        *("2002:a9fe:a9fe::", "fd00:ec2::254", "100.100.100.200", "0.0.0.0", "::", "224.0.0.1"),
    ],
)
def test_addresses_that_only_tricks_lead_to_are_not_asked(address):
    assert is_forbidden(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.7", "192.168.1.1", "93.184.216.34", "::1", "2606::1"]
)
def test_a_host_that_the_user_named_may_be_anywhere_else(address):
    assert not is_forbidden(address)


def test_a_host_at_a_forbidden_address_is_not_asked():
    with pytest.raises(UnfetchedError, match=r"169\.254\.169\.254"):
        find_address(Uri.parse("http://169.254.169.254/latest/meta-data/"))


def test_a_host_that_cannot_be_has_no_image():
    with pytest.raises(UnfetchedError) as raised:
        find_address(Uri.parse(f"http://{'a' * 64}.example/a.jpg"))
    assert raised.value.status is Status.NO_IMAGE


def test_a_message_shows_neither_signature_nor_password():
    assert (
        str(Uri.parse("https://images.example/a.jpg?X-Amz-Signature=abc")) == "https://images.example/a.jpg"
    )
