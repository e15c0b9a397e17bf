"""What scripts/setup and the tests' environments tell uv, of what pip is told."""

from scripts.uv_settings import uv_settings

PIP_LIST = r"""global.cert='/etc/ssl/ca.pem'
global.find-links='/wheels\n/more'
global.extra-index-url='file:///one https://two.example/simple'
install.index-url='https://mirror.example/simple'
:env:.no-index='1'
"""


def test_pips_configuration_holds_for_uv() -> None:
    """Goal: a mirror, wheels and certificates of this machine are found by uv too; variables come before files, and
    what is said to uv itself before both. Red with pip's configuration left out."""
    alone = {"UV_SYSTEM_CERTS": "1", "UV_NO_PROGRESS": "1"}
    assert uv_settings({}, "") == alone
    told = {
        **alone,
        "SSL_CERT_FILE": "/etc/ssl/ca.pem",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INDEX": "file:///one https://two.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
    }
    assert uv_settings({}, PIP_LIST) == told
    environment = {
        "PIP_INDEX_URL": "https://nearer.example/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "UV_FIND_LINKS": "/own",
        "HOME": "/root",
    }
    found = uv_settings(environment, PIP_LIST)
    assert found == {
        **alone,
        "SSL_CERT_FILE": "/etc/ssl/ca.pem",
        "UV_FIND_LINKS": "/own",
        "UV_DEFAULT_INDEX": "https://nearer.example/simple",
    }
