"""Messages to a webhook: a server of the test's own receives them, Prefect's test server keeps the automations."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from flows import notify, shared

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

NAMES = {f"vision-finetune: {what}" for what in ("a run failed", "no nightly run finished", "new champion")}


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address that takes messages, refuses them below /refuse, and the list of what it took."""
    received: list[dict[str, str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if refused := self.path.startswith("/refuse"):
                received.clear()
            else:
                received.append(body)
            self.send_response(404 if refused else 200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()
    server.server_close()


def test_automations_are_made_once_and_messages_arrive(
    prefect_server: None, webhook: tuple[str, list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.client.orchestration import get_client

    url, received = webhook
    assert notify.main([f"{url}/hook", "--field", "content", "--test"]) == 0
    assert notify.main([f"{url}/hook"]) == 0
    assert received == [{"content": "vision-finetune: a test\nMessages about runs will come here."}]
    with get_client(sync_client=True) as client:
        automations = client.read_automations()
        assert sorted(automation.name for automation in automations) == sorted(NAMES)
        assert all(automation.enabled for automation in automations)
        for automation in automations:
            client.delete_automation(automation.id)
    capsys.readouterr()
    assert notify.main([f"{url}/refuse", "--test"]) == 2
    assert "refused the test message" in capsys.readouterr().err


def test_a_wrong_address_and_no_server_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert notify.main(["hooks.example/x"]) == 2
    assert "is no address of a webhook" in capsys.readouterr().err
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(set_defaults={PREFECT_API_URL: None}, restore_defaults={PREFECT_API_URL}):
        assert notify.main(["https://hooks.example/x"]) == 2
    assert "PREFECT_API_URL is not set" in capsys.readouterr().err


def test_only_a_new_champion_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, dict[str, str], dict[str, Any]]] = []
    monkeypatch.setattr(shared, "emit_event", lambda name, resource, payload: events.append((name, resource, payload)))
    registered = {"model": "receipts", "version": 4, "champion": False, "reason": "no clear difference"}
    for summary in ({}, {"registered": None}, {"registered": registered}):
        shared.announce_champion(summary)
    assert events == []
    shared.announce_champion({"registered": registered | {"champion": True, "reason": "better"}})
    ((name, resource, payload),) = events
    assert payload == {"model": "receipts", "version": 4, "reason": "better"}
    # What the automation waits for.
    trigger = notify.automations("0" * 32)[-1]["trigger"]
    assert trigger["expect"] == [name]
    assert resource["prefect.resource.id"].startswith(trigger["match"]["prefect.resource.id"].removesuffix("*"))
