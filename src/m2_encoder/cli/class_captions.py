"""Folders of classes for `m2-data pack`: names in templates as captions.

Reference: FLYP (arXiv:2212.00638): fine-tuning on classes by the contrastive loss of pre-training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from m2_encoder.config.paths import find_path
from m2_encoder.data.packing.listed import ClassTexts
from m2_encoder.data.packing.sources import Source
from m2_encoder.data.samples.language import read_language
from m2_encoder.data.samples.parse import CaptionText
from m2_encoder.errors import UserError, under
from m2_encoder.evaluation.prompts import FAMILIES, expand, load_templates
from m2_encoder.evaluation.sets.image_folder import list_classes, read_image_folder
from m2_encoder.types import LANGUAGES

_FOLDERS: Final = "folders"  # in place of a file of names


def read_classes(cfg: Mapping[str, Any], source: Source) -> dict[str, ClassTexts]:
    """Captions and identity of each class, by the names of the folders; a class is its names, in whatever source.

    Raises:
        UserError: for a source without such folders, names that do not fit them, and templates that cannot be read.
    """
    if source.format != "folder":
        raise UserError("belongs to a folder of pictures; leave it out", key="classes", value=cfg["classes"])
    root = source.paths[0]
    labels = None if cfg["classes"] == _FOLDERS else str(find_path(cfg["classes"]))
    try:
        found = read_image_folder(root, labels=labels).classes
    except UserError as error:
        raise UserError(error.text, key="classes", value=cfg["classes"]) from error
    assert found is not None
    captions: dict[str, list[CaptionText]] = {folder: [] for folder in list_classes(root)}
    identities: dict[str, list[str]] = {folder: [] for folder in captions}
    for tag, names in found.names.items():
        language = read_language(tag)
        if language not in LANGUAGES:
            raise UserError(f"has names in {tag}; wanted Chinese or English", key="classes", value=cfg["classes"])
        templates = load_templates(_source_of(cfg["templates"], language), language)
        for folder, name, texts in zip(captions, names, expand(names, templates.rows), strict=True):
            captions[folder] += [CaptionText(text, language, None) for text in texts]
            identities[folder].append(name)
    marks = {folder: "class: " + " | ".join(names) for folder, names in identities.items()}
    return {folder: ClassTexts(tuple(own), marks[folder]) for folder, own in captions.items()}


def _source_of(templates: str | Mapping[str, str], language: str) -> str:
    with under("templates"):
        if isinstance(templates, str):
            source = templates
        elif language in templates:
            source = templates[language]
        else:
            raise UserError(f"must have those of {language}, which classes are named in", value=dict(templates))
        if source in FAMILIES:
            return source
        if not (path := find_path(source)).is_file():
            raise UserError(f"no such family or file; choose {', '.join(FAMILIES)}, or a file", value=source)
        return str(path)
