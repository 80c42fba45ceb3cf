from __future__ import annotations

import hashlib
import hmac
import json
import socket
import threading
from asyncio.base_events import Server
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope

from handlers.notify import email, webhook
from pipeline import ArtifactStore, Context, Fail, ParamsError, Refused, Retry


def context(folder: Path, **settings: Any) -> Context:
    return Context(
        execution_id="exec-1",
        task_id="task",
        workflow_id="w",
        attempt=1,
        artifacts=ArtifactStore(root=str(folder), folder="f"),
        settings=settings,
    )


class Receiver:
    """A real HTTP server that answers every POST with `status` and remembers it."""

    def __init__(self) -> None:
        receiver = self
        self.status, self.headers = 204, {"Retry-After": "3"}
        self.seen: list[tuple[dict[str, str], bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.seen.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(receiver.status)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *args: Any, **more: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


def test_webhook_posts_the_payload_with_the_same_key_in_every_attempt(tmp_path: Path, receiver: Receiver) -> None:
    site = context(tmp_path, http_allow_hosts=("127.0.0.1",))
    for _ in range(2):
        assert webhook(receiver.url, {"é": [1]}, {"X-From": "us"}, context=site) == {"status": 204}
    (headers, body), (again, _) = receiver.seen
    assert json.loads(body) == {"é": [1]}
    assert (headers["content-type"], headers["x-from"]) == ("application/json", "us")
    assert headers["idempotency-key"] == again["idempotency-key"] == "exec-1_task"
    assert "x-signature-256" not in headers


def test_webhook_with_a_secret_is_signed(tmp_path: Path, receiver: Receiver) -> None:
    webhook(receiver.url, {"a": 1}, secret="s3cret", context=context(tmp_path, http_allow_hosts=("127.0.0.1",)))
    headers, body = receiver.seen[0]
    assert headers["x-signature-256"] == "sha256=" + hmac.new(b"s3cret", body, hashlib.sha256).hexdigest()
    assert "s3cret" not in str(receiver.seen)


def test_webhook_to_a_private_address_is_refused(tmp_path: Path, receiver: Receiver) -> None:
    with pytest.raises(Refused, match="PIPELINE_HTTP_ALLOW_HOSTS"):
        webhook(receiver.url, {}, context=context(tmp_path))
    assert receiver.seen == []


@pytest.mark.parametrize(
    ("status", "error"), [(302, Fail), (404, Fail), (503, Retry), (429, Retry), (500, RuntimeError)]
)
def test_webhook_status_decides_how_it_fails(
    tmp_path: Path, receiver: Receiver, status: int, error: type[Exception]
) -> None:
    receiver.status, receiver.headers = status, {"Location": "/hook", "Retry-After": "3"}
    with pytest.raises(error, match=f"status {status}") as raised:
        webhook(receiver.url, {}, context=context(tmp_path, http_allow_hosts=("127.0.0.1",)))
    assert len(receiver.seen) == 1
    if isinstance(raised.value, Retry):
        assert raised.value.after == 3


class Mailbox:
    """What a mail server took; addresses at refuse.example are not taken."""

    def __init__(self) -> None:
        self.letters: list[tuple[str, list[str], EmailMessage]] = []
        self.logins: list[bytes] = []
        self.refusal = "550 no such person"

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Envelope, address: str, _options: Any) -> str:
        if address.endswith("@refuse.example"):
            return self.refusal
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        message = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.letters.append((envelope.mail_from or "", list(envelope.rcpt_tos), message))
        return "250 OK"


class MailServer(Controller):
    """On a port that the system chose."""

    def _trigger_server(self) -> None:
        assert isinstance(self.server, Server)
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()  # type: ignore[no-untyped-call]


@contextmanager
def mail_server(mailbox: Mailbox, **options: Any) -> Iterator[int]:
    controller = MailServer(mailbox, hostname="127.0.0.1", port=0, server_hostname="localhost", **options)
    controller.start()
    try:
        yield controller.port
    finally:
        controller.stop()


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture
def url(mailbox: Mailbox) -> Iterator[str]:
    with mail_server(mailbox) as port:
        yield f"smtp://127.0.0.1:{port}/?from=pipeline@example.org"


def test_email_arrives_as_text_and_html(tmp_path: Path, mailbox: Mailbox, url: str) -> None:
    to = ["ana@example.org", "bo@example.org"]
    result = email(to, "Größe", "plain é", "<p>rich</p>", context=context(tmp_path, smtp_url=url))
    sender, recipients, message = mailbox.letters[0]
    text, html = message.get_body(("plain",)), message.get_body(("html",))
    assert text is not None
    assert html is not None
    assert (sender, recipients) == ("pipeline@example.org", to)
    assert (message["Subject"], message["From"]) == ("Größe", "pipeline@example.org")
    assert (text.get_content().strip(), html.get_content().strip()) == ("plain é", "<p>rich</p>")
    assert result == {"message_id": message["Message-ID"], "refused": []}


def test_email_message_id_is_the_same_in_every_attempt(tmp_path: Path, mailbox: Mailbox, url: str) -> None:
    for _ in range(2):
        email(["ana@example.org"], "s", "t", context=context(tmp_path, smtp_url=url))
    assert [letter[2]["Message-ID"] for letter in mailbox.letters] == ["<exec-1_task@127.0.0.1>"] * 2


@pytest.mark.parametrize("url", [None, ""])
def test_email_without_a_mail_server_is_refused(tmp_path: Path, url: str | None) -> None:
    with pytest.raises(Refused, match="PIPELINE_SMTP_URL"):
        email(["ana@example.org"], "s", "t", context=context(tmp_path, smtp_url=url))


@pytest.mark.parametrize(
    ("to", "subject"),
    [
        ("ana@example.org\r\nBcc: eve@example.org", "s"),
        ("ana@example.org\nX: y", "s"),
        ("ana@example.org, eve@example.org", "s"),
        ("ana@example.org>, <eve@example.org", "s"),
        ("Ana <ana@example.org>", "s"),
        ("", "s"),
        ("ana", "s"),
        ("ana@", "s"),
        ("ana@example.org", "s\r\nBcc: eve@example.org"),
        ("ana@example.org", "s\nX: y"),
        ("ana@example.org", "s\r"),
    ],
)
def test_email_that_would_add_a_header_or_recipient_is_a_params_error(
    tmp_path: Path, mailbox: Mailbox, url: str, to: str, subject: str
) -> None:
    with pytest.raises(ParamsError, match="header"):
        email([to], subject, "t", context=context(tmp_path, smtp_url=url))
    assert mailbox.letters == []


def test_email_refused_for_one_recipient_reaches_the_others(tmp_path: Path, mailbox: Mailbox, url: str) -> None:
    to = ["ana@example.org", "x@refuse.example"]
    assert email(to, "s", "t", context=context(tmp_path, smtp_url=url))["refused"] == ["x@refuse.example"]
    assert mailbox.letters[0][1] == ["ana@example.org"]


@pytest.mark.parametrize(("refusal", "error"), [("550 never", Fail), ("451 later", OSError)])
def test_email_refused_for_all_fails_for_good_only_where_the_server_says_so(
    tmp_path: Path, mailbox: Mailbox, url: str, refusal: str, error: type[Exception]
) -> None:
    mailbox.refusal = refusal
    with pytest.raises(error) as raised:
        email(["x@refuse.example"], "s", "t", context=context(tmp_path, smtp_url=url))
    assert isinstance(raised.value, Fail) == (error is Fail)


@pytest.fixture
def closed_url(mailbox: Mailbox) -> Iterator[str]:
    """A mail server that wants me@example.org with the password p@ss; {} stands for the password."""

    def check(_server: Any, _session: Any, _envelope: Any, _mechanism: Any, data: Any) -> AuthResult:
        mailbox.logins.append(data.login)
        return AuthResult(success=(data.login, data.password) == (b"me@example.org", b"p@ss"), handled=False)

    with mail_server(mailbox, authenticator=check, auth_require_tls=False) as port:
        yield f"smtp://me%40example.org:{{}}@127.0.0.1:{port}"


def test_email_logs_in_with_the_password_of_the_url(tmp_path: Path, mailbox: Mailbox, closed_url: str) -> None:
    email(["ana@example.org"], "s", "t", context=context(tmp_path, smtp_url=closed_url.format("p%40ss")))
    assert mailbox.logins == [b"me@example.org"]
    assert mailbox.letters[0][0] == "me@example.org"


def test_email_with_a_wrong_password_fails_and_does_not_tell_it(
    tmp_path: Path, mailbox: Mailbox, closed_url: str
) -> None:
    with pytest.raises(Fail, match="535") as raised:
        email(["ana@example.org"], "s", "t", context=context(tmp_path, smtp_url=closed_url.format("canary")))
    assert "canary" not in str(raised.value)
    assert mailbox.letters == []


def test_email_starttls_that_the_server_lacks_sends_nothing(tmp_path: Path, mailbox: Mailbox, url: str) -> None:
    with pytest.raises(OSError, match="STARTTLS"):
        email(["ana@example.org"], "s", "t", context=context(tmp_path, smtp_url=url + "&starttls=1"))
    assert mailbox.letters == []


def test_email_server_that_is_away_is_an_ordinary_error(tmp_path: Path) -> None:
    with closing(socket.socket()) as deaf:
        deaf.bind(("127.0.0.1", 0))
        url = f"smtp://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(ConnectionError):
            email(["ana@example.org"], "s", "t", context=context(tmp_path, smtp_url=url))
