"""Uploads to the Hub. Its client is imported when one starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vlm.errors import ExportError
from vlm.hub import network_errors


def upload(folder: str, repo_id: str, token: str | None, private: bool | None, message: str) -> str:
    """Uploads a folder.

    Args:
        folder: With the files.
        repo_id: ``"user/name"`` on the Hub, made if it is not there.
        token: With write access; None takes the one of the login.
        private: Of a new repository.
        message: Of the commit.

    Returns:
        The address of the upload.

    Raises:
        ExportError: The Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo_id):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message))


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what the client raises into one error with its remedy.

    Args:
        repo_id: ``"user/name"`` on the Hub.

    Raises:
        ExportError: The Hub cannot be reached or refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise ExportError(f"{repo_id!r} is no name on the Hub ({error}); give 'user/name'") from error
    except LocalTokenNotFoundError as error:
        raise ExportError(
            f"uploading to {repo_id!r} needs a login; run `hf auth login` or give token=… with write access"
        ) from error
    except network_errors(OfflineModeIsEnabled) as error:
        raise ExportError(
            f"the Hub cannot be reached for {repo_id!r} ({type(error).__name__}: {error}); connect to the network (and unset"
            " HF_HUB_OFFLINE), or save to a folder with save_pretrained and upload that later"
        ) from error
    except HfHubHTTPError as error:
        raise ExportError(
            f"the Hub refuses the upload to {repo_id!r} ({error}); check the name and that the token may write to it"
        ) from error
