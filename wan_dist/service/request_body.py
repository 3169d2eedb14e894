"""Body of a request: JSON, or a form with files, to fields and uploaded images."""

import base64
import binascii
import json
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from wan_dist.runtime.errors import InputError
from wan_dist.service.upload_fields import UPLOAD_FIELDS

_MAX_FORM_FILES = 4
_MAX_FORM_FIELDS = 100


async def read_request_body(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the fields and the uploaded images of a request, by name; raises InputError.

    A name that the client gives a file is not looked at.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _read_form(request)
    if content_type == "application/json":
        return _parse_json(await request.body())
    raise InputError(
        f"Content-Type is {content_type or 'missing'}; send application/json or multipart/form-data"
    )


async def _read_form(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    fields: dict[str, Any] = {}
    uploads: dict[str, bytes] = {}
    async with request.form(max_files=_MAX_FORM_FILES, max_fields=_MAX_FORM_FIELDS) as form:
        for name, value in form.multi_items():
            if name in fields or name in uploads:
                raise InputError(f"{name} is given twice")
            if not isinstance(value, UploadFile):
                fields[name] = value
            elif name in UPLOAD_FIELDS:
                uploads[name] = await value.read()
            else:
                raise InputError(f"{name} is a file; files are {', '.join(UPLOAD_FIELDS)}")
    return fields, uploads


def _parse_json(body: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        fields = json.loads(body, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError('the body is not a JSON object, such as {"prompt": "two cats boxing"}')
    uploads = {}
    for name in UPLOAD_FIELDS:
        value = fields.get(name)
        if isinstance(value, dict):  # OpenAI's form of a reference
            value = value.get("image_url")
        if isinstance(value, str) and value.startswith("data:"):
            uploads[name] = _decode_data_url(name, value)
            del fields[name]
    return fields, uploads


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _decode_data_url(name: str, url: str) -> bytes:
    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise InputError(f"{name} must be a data: URL in base64, as data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise InputError(f"{name} is not base64: {error}") from None
