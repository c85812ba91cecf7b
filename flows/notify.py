"""Has Prefect say on a webhook when a run fails, when no nightly run finishes, and when there is a new champion.

python -m flows.notify https://hooks.slack.com/services/…      Slack, Mattermost, Rocket.Chat
python -m flows.notify https://discord.com/api/webhooks/… --field content
python -m flows.notify https://hooks.slack.com/services/… --test    also sends one message now
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from flows.cli import complain
from flows.settings import Parser

BLOCK = "vision-finetune-notifications"
# Longer than a day, so that a run that takes an hour more than the night before is no alarm.
NIGHTLY_WITHIN = timedelta(hours=30)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0 when it worked, 2 when something is wrong.
    """
    parser = Parser(
        prog="python -m flows.notify",
        description="Makes Prefect automations that send a message to a webhook when a run fails, when no nightly run has"
        f" finished for {NIGHTLY_WITHIN // timedelta(hours=1)} hours, and when a registered model has a new champion. Run"
        " again, it replaces them.",
        allow_abbrev=False,
    )
    parser.add_argument("url", help="address that takes a JSON object by POST")
    parser.add_argument(
        "--field",
        default="text",
        metavar="NAME",
        help="name of the object's entry with the message (default: %(default)s)",
    )
    parser.add_argument("--test", action="store_true", help="also send a message now")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        names = set_up(options.url, options.field, send_test=options.test)
    except Exception as error:
        return complain(error, status=2)
    sys.stdout.write("".join(f"automation {name!r}\n" for name in names))
    return 0


def set_up(url: str, field: str, *, send_test: bool = False) -> list[str]:
    """Stores the webhook as a block and makes or replaces the automations.

    Args:
        url: Address that takes a JSON object by POST.
        field: Name of the object's entry with the message.
        send_test: Whether to send a message now.

    Returns:
        Names of the automations.

    Raises:
        ConfigError: The address is none, there is no Prefect server, or the test message was refused.
    """
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore
    from prefect.settings import PREFECT_API_URL

    from vlm.errors import ConfigError

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{url!r} is no address of a webhook; give one that begins with https://")
    if not PREFECT_API_URL.value():
        raise ConfigError(
            "PREFECT_API_URL is not set, so there is no server to send anything; start one with `prefect server start` and"
            " set it to the address that it prints, with /api at its end"
        )
    block = CustomWebhookNotificationBlock(name=BLOCK, url=url, json_data={field: "{{subject}}\n{{body}}"}, secrets={})
    block_id = block.save(BLOCK, overwrite=True)
    wanted = [AutomationCore.model_validate(automation) for automation in automations(str(block_id))]
    with get_client(sync_client=True) as client:
        for automation in wanted:
            for old in client.read_automations_by_name(automation.name):
                client.delete_automation(old.id)
            client.create_automation(automation)
    if send_test:
        try:
            block.notify("Messages about runs will come here.", subject="vision-finetune: a test")
        except Exception as error:
            raise ConfigError(
                f"the webhook refused the test message ({error}); check its address and --field"
            ) from error
    return [automation.name for automation in wanted]


def automations(block_id: str) -> list[dict[str, Any]]:
    """The automations as Prefect takes them.

    Args:
        block_id: Of the notification block that sends their messages.
    """

    def send(subject: str, body: str) -> list[dict[str, Any]]:
        return [{"type": "send-notification", "block_document_id": block_id, "subject": subject, "body": body}]

    flows = {"prefect.resource.role": "flow", "prefect.resource.name": ["vision-finetune", "evaluate"]}
    nightly = {"prefect.resource.role": "deployment", "prefect.resource.name": ["nightly"]}
    runs = {"prefect.resource.id": "prefect.flow-run.*"}
    return [
        {
            "name": "vision-finetune: a run failed",
            "trigger": {
                "type": "event",
                "posture": "Reactive",
                "expect": [f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")],
                "match": runs,
                "match_related": flows,
                "threshold": 1,
            },
            "actions": send(
                "{{ flow.name }}: {{ flow_run.name }} ended as {{ flow_run.state.name }}",
                "{{ flow_run.state.message }}\n{{ flow_run | ui_url }}",
            ),
        },
        {
            "name": "vision-finetune: no nightly run finished",
            "trigger": {
                "type": "event",
                "posture": "Proactive",
                "expect": ["prefect.flow-run.Completed"],
                "match": runs,
                "match_related": nightly,
                "threshold": 1,
                "within": int(NIGHTLY_WITHIN.total_seconds()),
            },
            "actions": send(
                "vision-finetune: no nightly run finished",
                f"None of the deployment `nightly` for {NIGHTLY_WITHIN // timedelta(hours=1)} hours. Is a worker running?",
            ),
        },
        {
            "name": "vision-finetune: new champion",
            "trigger": {
                "type": "event",
                "posture": "Reactive",
                "expect": ["vision-finetune.champion"],
                "match": {"prefect.resource.id": "vision-finetune.model.*"},
                "threshold": 1,
            },
            "actions": send(
                "{{ event.payload.model }}: version {{ event.payload.version }} is champion",
                "{{ event.payload.reason }}",
            ),
        },
    ]


if __name__ == "__main__":
    raise SystemExit(main())
