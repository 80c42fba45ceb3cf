"""Messages to people and to other systems."""

from __future__ import annotations

import hashlib
import hmac
import json
import smtplib
import ssl
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import formatdate
from typing import Annotated, Any
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from pydantic import Field

from handlers.outbound import build, check_status, exchange
from pipeline import Context, Fail, ParamsError, Refused, handler

#: seconds for each step of the conversation with the mail server
_SMTP_TIMEOUT = 30


@handler("notify.webhook")
def webhook(
    url: str,
    payload: dict[str, Any],
    headers: dict[str, str] | None = None,
    secret: str | None = None,
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 30,
    *,
    context: Context,
) -> dict[str, Any]:
    """POST a JSON payload to a URL, signed where there is a secret.

    The Idempotency-Key header is the same in every attempt, so the receiver can drop repeats. Redirects are not
    followed.

    Params:
        url: http or https.
        payload: sent as compact JSON.
        headers: further headers.
        secret: key of the X-Signature-256 header, `sha256=` and the HMAC-SHA256 of the body in hex; best given as
            `{{ secrets.NAME }}`.
        timeout: seconds for everything.

    Result: `{"status"}`.

    Errors: Refused where the host has an address that is not public; Retry at 429, 502, 503 and 504; Fail at any other
    status that is not 2xx and below 500; RuntimeError at 5xx; ConnectionError and TimeoutError.

    Settings: PIPELINE_HTTP_ALLOW_HOSTS lists private hosts that may be reached; none by default.
    """
    content = json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()
    defaults = {"content-type": "application/json", "idempotency-key": context.idempotency_key}
    if secret is not None:
        signature = hmac.new(secret.encode(), content, hashlib.sha256).hexdigest()
        headers = {**(headers or {}), "X-Signature-256": f"sha256={signature}"}
    with exchange(
        build("POST", url, headers=headers, content=content, defaults=defaults),
        allow_hosts=context.settings.get("http_allow_hosts", ()),
        timeout=timeout,
        max_bytes=65_536,
        redirects=0,
    ) as reply:
        check_status(reply)
        return {"status": reply.status}


@handler("notify.email")
def email(
    to: Annotated[list[str], Field(min_length=1, max_length=100)],
    subject: str,
    text: str,
    html: str | None = None,
    *,
    context: Context,
) -> dict[str, Any]:
    """Send an e-mail through the site's mail server.

    The Message-ID is the same in every attempt, so a repeat can be recognised.

    Params:
        to: addresses, one an entry.
        subject: one line.
        text: the message as plain text.
        html: the same message as HTML, for programs that show it.

    Result: `{"message_id", "refused"}`: `refused` lists the addresses that the server did not take.

    Errors: Refused where the site has no mail server; ParamsError where an address or the subject cannot stand in a
    header; Fail where the server refuses for good (5xx); other errors of smtplib, and OSError.

    Settings: PIPELINE_SMTP_URL, as `smtp://user:password@host:587/?starttls=1&from=pipeline@example.org` or
    `smtps://...`; unset by default. The sender is `from`, else the user's name where it is an address.
    """
    given = context.settings.get("smtp_url")
    if not given:
        raise Refused("notify.email has no mail server; PIPELINE_SMTP_URL names one")
    if "\r" in subject or "\n" in subject:
        raise ParamsError("the subject cannot stand in a header: it has more than one line")
    server = urlsplit(given)
    message = EmailMessage()
    try:
        recipients = [str(Address(addr_spec=address)) for address in to]
        message["From"] = str(Address(addr_spec=_sender(server)))
        message["To"] = ", ".join(recipients)
        message["Subject"] = subject
    except (MessageError, ValueError, IndexError) as exc:
        raise ParamsError(f"an address or the subject cannot stand in a header: {exc}") from exc
    message["Date"] = formatdate(usegmt=True)
    message["Message-ID"] = f"<{quote(context.idempotency_key, safe='')}@{server.hostname}>"
    message.set_content(text)
    if html is not None:
        message.add_alternative(html, subtype="html")
    try:
        refused = _send(server, message)
    except smtplib.SMTPRecipientsRefused as exc:
        if all(code >= 500 for code, _ in exc.recipients.values()):
            raise Fail(f"the mail server takes none of {', '.join(recipients)}") from exc
        raise
    except smtplib.SMTPResponseException as exc:
        if exc.smtp_code >= 500:
            raise Fail(f"the mail server refuses: {exc.smtp_code} {exc.smtp_error!r}") from exc
        raise
    return {"message_id": message["Message-ID"], "refused": refused}


def _sender(server: SplitResult) -> str:
    name = unquote(server.username or "")
    return parse_qs(server.query).get("from", [name if "@" in name else f"pipeline@{server.hostname}"])[0]


def _send(server: SplitResult, message: EmailMessage) -> list[str]:
    if server.scheme not in ("smtp", "smtps") or not server.hostname:
        raise Refused("PIPELINE_SMTP_URL must be smtp://host or smtps://host")
    trust = ssl.create_default_context()
    client = (
        smtplib.SMTP_SSL(server.hostname, server.port or 465, timeout=_SMTP_TIMEOUT, context=trust)
        if server.scheme == "smtps"
        else smtplib.SMTP(server.hostname, server.port or 587, timeout=_SMTP_TIMEOUT)
    )
    with client:
        if parse_qs(server.query).get("starttls", ["0"])[0] == "1":
            client.starttls(context=trust)
        if server.username:
            client.login(unquote(server.username), unquote(server.password or ""))
        return sorted(client.send_message(message))
