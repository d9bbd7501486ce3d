"""The HTTP server around the app: waitress, its socket, and the connections of its clients."""

import json
import socket
import time

from gptlib.common import UserError
from gptlib.serving.api import ApiError


def listen(host, port):
    """A listening socket. Raises UserError if the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), backlog=1024, family=family)
    except OSError as e:
        hint = " (macOS has AirPlay Receiver on port 5000)" if port == 5000 else ""
        raise UserError(f"cannot listen on {host} port {port} ({e.strerror}): "
                        f"choose others with HOST and PORT{hint}") from e


def json_error_channel():
    """A waitress channel whose own errors (body too large, not HTTP) are JSON, as the app's are."""
    from waitress.channel import HTTPChannel
    from waitress.task import ErrorTask

    class JsonErrorTask(ErrorTask):
        def execute(self):
            error = self.request.error
            answer = ApiError(error.code, f"{error.reason}: {error.body}").body()
            body = json.dumps(answer).encode()
            self.status = f"{error.code} {error.reason}"
            self.content_length = len(body)
            self.response_headers.append(("Content-Type", "application/json"))
            self.set_close_on_finish()
            self.write(body)

    class JsonErrorChannel(HTTPChannel):
        error_task_class = JsonErrorTask

    return JsonErrorChannel


def create_server(app, host, port, threads, max_body_size):
    """A waitress server around the app, already listening."""
    import waitress
    server = waitress.create_server(
        app, sockets=[listen(host, port)], threads=threads,
        channel_request_lookahead=1,  # read on while a request runs, to notice who disconnects
        max_request_body_size=max_body_size + 1,
        asyncore_use_poll=True, connection_limit=1000, log_socket_errors=False, ident="")
    server.channel_class = json_error_channel()
    return server


def wait_until_sent(server, seconds):
    """Wait at most this long for answers that are written but not yet sent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        channels = list(server.active_channels.values())
        if not any(c.requests or c.total_outbufs_len for c in channels):
            return
        time.sleep(0.02)


def disconnect_check(environ):
    """A function that returns whether the client of this WSGI request has hung up.

    It always returns False if the WSGI server gives no way to know.
    """
    if "waitress.client_disconnected" in environ:
        return environ["waitress.client_disconnected"]
    connection = environ.get("gunicorn.socket")
    if connection is None:
        return lambda: False

    def is_closed():
        try:
            # a closed connection reads as b""; peeking leaves the data of an open one in place
            return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except (BlockingIOError, ValueError):  # no data yet, or TLS, which cannot peek
            return False
        except OSError:
            return True

    return is_closed
