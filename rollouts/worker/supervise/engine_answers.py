"""Is an engine there? One question over HTTP, one over TCP; both on this machine. Standard library only."""

import http.client
import socket
import urllib.error
import urllib.parse
import urllib.request

ANSWER_TIMEOUT_S = 2.0

# http_proxy is not for our own host
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers_ready(url: str) -> bool:
    """Does `url` answer 200 within ANSWER_TIMEOUT_S?"""
    return _status(url, ANSWER_TIMEOUT_S) == 200


def answers(url: str, *, timeout_s: float) -> bool:
    """Does `url` answer at all within `timeout_s`, whatever the status?"""
    return _status(url, timeout_s) is not None


def _status(url: str, timeout_s: float) -> int | None:
    try:
        with _direct.open(url, timeout=timeout_s) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):  # refused, reset, slow, not HTTP
        return None


def port_is_taken(url: str) -> bool:
    """Does anything listen where `url` points? One that hangs, its queue of connections full, does too."""
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None and parts.port is not None, f"{url}: needs a host and a port"
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_TIMEOUT_S):
            return True
    except TimeoutError:
        return True
    except OSError:
        return False
