"""Who may ask the server, and how often: key, host name, other pages of the web, rate, proxies."""

import hmac
import ipaddress
import time

from gptlib.common import UserError
from gptlib.serving.api import ApiError

CORS_SECONDS = 600  # for which a browser may remember a preflight's answer
CORS_HEADERS = "Authorization, Content-Type, X-API-Key"


def split_list(text):
    """The items of a setting that separates them by commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


# -----------------------------------------------------------------------------
# addresses and names


def is_loopback(host):
    """Whether a host name or an address is that of this machine alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(header):
    """The name in a Host header, without the port, in small letters."""
    name, _, port = header.rpartition(":")
    return (name if name and port.isdigit() else header).lower()


def client_address(request, trusted_proxies):
    """The address of the client; trusted_proxies: how many proxies of ours a request passes.

    Each proxy appends to X-Forwarded-For the address that it was asked from. What stands before
    those entries is the client's own invention.
    """
    hops = split_list(",".join(request.headers.getlist("X-Forwarded-For")))
    if 0 < trusted_proxies <= len(hops):
        return hops[-trusted_proxies]
    return request.remote_addr or ""


# -----------------------------------------------------------------------------
# checks, each registered once for all routes


def register_host_check(app, allowed_hosts):
    """Answer only requests for a loopback name or one of allowed_hosts.

    Without it, a web page could read a private model on the machine of its reader: its own host
    name may be made to mean 127.0.0.1 (DNS rebinding).
    """
    from flask import request

    @app.before_request
    def check_host():
        name = host_name(request.headers.get("Host", ""))
        if name and not is_loopback(name) and name not in allowed_hosts:
            raise ApiError(403, f"this server does not answer to the host name {name[:100]!r}: "
                           "use localhost, or start it with ALLOWED_HOSTS or an API_KEY")


def has_key(request, api_key):
    """Whether a request carries the key, compared in constant time."""
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    bearer = bearer.strip() if scheme.lower() == "bearer" else ""
    key = request.headers.get("X-API-Key") or bearer
    # headers arrive as latin-1: this gives back the bytes that the client sent
    return hmac.compare_digest(key.encode("latin-1", "replace"), api_key.encode())


def register_authentication(app, api_key, without_key):
    """Answer 401 to a request without the API key; without_key: endpoints that need none."""
    from flask import request

    @app.before_request
    def check_key():
        if request.endpoint not in without_key and not has_key(request, api_key):
            raise ApiError(401, "the API key is missing or wrong: expected "
                           "Authorization: Bearer KEY, or X-API-Key: KEY", code="invalid_api_key")


def register_cors(app, origins):
    """Let pages of these origins ("*": of all) read the answers; register it before the key.

    A browser asks for leave first (a preflight), and sends no key with that.
    """
    from flask import request

    def is_allowed():
        origin = request.headers.get("Origin")
        return origin is not None and ("*" in origins or origin in origins)

    @app.before_request
    def answer_preflight():
        is_preflight = "Access-Control-Request-Method" in request.headers
        if request.method == "OPTIONS" and is_preflight and is_allowed():
            return app.response_class(status=204, headers={
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": CORS_HEADERS,
                "Access-Control-Max-Age": str(CORS_SECONDS)})

    @app.after_request
    def allow_origin(response):
        response.vary.add("Origin")
        if is_allowed():
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = "Retry-After"
        return response


class RateLimit:
    """How many sequences of text one address may ask for.

    text: such as "60 per minute"; "": unlimited. Raises UserError for another text.
    """

    def __init__(self, text):
        from limits import parse_many
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter
        try:
            self.limits = parse_many(text) if text else []
        except ValueError as e:
            raise UserError(f"RATE_LIMIT is {text!r}: expected something like "
                            '"60 per minute" or "5/second"') from e
        self.storage = MemoryStorage()
        self.windows = MovingWindowRateLimiter(self.storage)

    def check_size(self, n):
        """Raise ApiError 400 for more sequences than the limit ever allows."""
        for limit in self.limits:
            if n > limit.amount:
                raise ApiError(400, f"the request makes {n} sequences: expected at most "
                               f"{limit.amount}, since the rate limit is {limit}")

    def count(self, address, n=1):
        """Count n sequences, all or none. Raises ApiError 429 if they are too many."""
        if n < 1:
            return
        for limit in self.limits:
            if not self.windows.test(limit, address, cost=n):
                raise self.too_many(limit, address)
        for limit in self.limits:
            self.windows.hit(limit, address, cost=n)

    def too_many(self, limit, address):
        seconds = self.windows.get_window_stats(limit, address).reset_time - time.time()
        if seconds > limit.get_expiry() + 1:
            # the clock has been set back: all would have to wait until it has caught up
            self.storage.reset()
            seconds = 1
        seconds = max(1, int(seconds))
        return ApiError(429, f"more than {limit}, the rate limit; try again in {seconds} seconds",
                        retry_after=seconds)
