"""Pretrained: a module that is one folder, read from a path or the Hugging Face Hub and pushed to it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import HfApi
from torch import nn

from gep import export
from gep.export_schema import Check

_Model = TypeVar("_Model", bound="Pretrained")
_MOST_PARAMETERS = 10**10  # ViT-g has 1.1e9
_UNFIT = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError)


class Pretrained(nn.Module):
    """What a model is besides its forward: a checked config, and a folder here or on the Hub.

    A subclass states what its config may hold and how a module is built of it; nothing else of a folder is run, and
    nothing in it is unpickled.
    """

    export_kind: ClassVar[str]
    """`kind` of the folder."""
    config_schema: ClassVar[Check]
    """What its config may hold."""

    @classmethod
    def _build(cls: type[_Model], config: Mapping[str, Any]) -> _Model:
        """A randomly initialised model of a config that was checked."""
        raise NotImplementedError

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Path:
        """Write config.json, model.safetensors and README.md.

        Args:
            folder: written whole or not at all; an earlier export in it is replaced.
            metrics, data: kept in the config and shown in the card; None = those the model has.
            name: what the card loads it by; None = the folder's name.
        Returns:
            The folder.
        Raises:
            See gep.export.save_folder.
        """
        raise NotImplementedError

    @classmethod
    def from_config(cls: type[_Model], config: Mapping[str, Any]) -> _Model:
        """A randomly initialised model of `config` (the property, or an export's config.json).

        Raises:
            ValueError: a value of another type or out of range, or values that do not fit together; nothing was
                allocated then.
        """
        cls.skeleton(config)
        return cls._build(config)

    @classmethod
    def skeleton(cls: type[_Model], config: Mapping[str, Any]) -> _Model:
        """The model of `config` on the meta device: names and shapes without memory; ValueError as from_config."""
        try:
            cls.config_schema(config, "config")
            with torch.device("meta"):
                model = cls._build(config)
        except _UNFIT as error:
            raise ValueError(f"{error}" if isinstance(error, ValueError) else f"{error!r}") from error
        if (count := sum(parameter.numel() for parameter in model.parameters())) > _MOST_PARAMETERS:
            raise ValueError(f"{count:.2e} parameters, at most {_MOST_PARAMETERS:.0e} are built")
        return model

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> _Model:
        """Load an export strictly, on the CPU and in evaluation mode.

        Args:
            name: folder, or id of a model on the Hugging Face Hub.
            revision: branch, tag or commit of the Hub's model; a commit's hash pins it.
            token, cache_dir, force_download, local_files_only: of the download, as in huggingface_hub.
        Raises:
            FileNotFoundError, ValueError: see gep.export.fetch, read_config and read_weights.
        """
        place: dict[str, Any] = {"cache_dir": cache_dir, "force_download": force_download}
        folder = export.fetch(name, revision=revision, token=token, local_files_only=local_files_only, **place)
        config = export.read_config(folder, cls.export_kind)
        try:
            own = cls.skeleton(config).state_dict()
        except ValueError as error:
            article = "an" if cls.__name__[0] in "AEIOU" else "a"
            raise ValueError(
                f"{folder / export.CONFIG} does not describe {article} {cls.__name__} ({error}): export again"
            ) from error
        state = export.read_weights(folder, own)
        model = cls._build(config)
        export.load_strict(model, state, source=str(folder))
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        commit_message: str = "Upload of a gep export",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Save the model and upload its folder in one commit; the repository is made where there is none.

        Args:
            repo_id: "user/model", or "model" for the user of the token.
            metrics, data: as save_pretrained.
            commit_message, private, token, create_pr: as in huggingface_hub.
            branch: made where there is none; None = main.
        Returns:
            The address of the commit.
        Raises:
            OSError: it could not be sent; the Hub shows what was there before.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as place:
            with _told(repo_id, token):
                repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
                if branch is not None:
                    api.create_branch(repo_id, branch=branch, exist_ok=True)
            folder = Path(place) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, metrics=metrics, data=data, name=repo_id)
            with _told(repo_id, token):
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                )


@contextmanager
def _told(repo_id: str, token: str | bool | None) -> Iterator[None]:
    """What the Hub refuses, as one OSError without secrets."""
    try:
        yield
    except Exception as error:  # httpx, huggingface_hub and OS errors share no base class
        raise OSError(
            f"{repo_id} could not be pushed to the Hugging Face Hub ({export.reason(error, token)}): check the name, "
            "the token and the connection"
        ) from None  # its own message may repeat the token
