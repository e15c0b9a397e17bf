"""Is an engine there? One question over HTTP, one over TCP; both on this machine. Standard library only."""

import http.client
import socket
import urllib.error
import urllib.parse
import urllib.request

ANSWER_TIMEOUT_S = 2.0

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # http_proxy is not for our own host


def answers_ready(url: str) -> bool:
    """Does `url` answer 200 within ANSWER_TIMEOUT_S?"""
    try:
        with _direct.open(url, timeout=ANSWER_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):  # refused, reset, slow, another status, not HTTP: not ready
        return False


def port_is_taken(url: str) -> bool:
    """Does anything accept connections where `url` points?"""
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None and parts.port is not None, f"{url}: needs a host and a port"
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_TIMEOUT_S):
            return True
    except OSError:
        return False
