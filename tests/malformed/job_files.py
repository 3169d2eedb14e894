"""Files of jobs that nobody should write, and some that look wrong and are not."""

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.malformed.case import SETTINGS, Case
from wan_dist.config.schema import RunConfig
from wan_dist.jobs.job_file import compose_job_configs, read_jobs
from wan_dist.planning.plan import make_plan
from wan_dist.tasks.run_config import read_config

Configs = list[RunConfig]


@cache
def _composed(settings: tuple[str, ...]) -> RunConfig:
    config = read_config(settings)
    assert config is not None
    return config


def configs(arguments: Sequence[str]) -> Configs:
    """Return the configurations of a file of jobs, as ``launch submit`` has them."""
    file, *settings = arguments
    return [
        config
        for _, config in compose_job_configs(
            read_jobs(Path(file)), settings, lambda given: _composed(tuple(given))
        )
    ]


def _written(file: str, content: str | bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [str(folder / file), *SETTINGS]

    return make


def _refused(name: str, file: str, content: str | bytes, *says: str) -> Case:
    return Case(name, _written(file, content), (file, *says), read=configs)


def _right(name: str, file: str, content: str | bytes, check: Callable[[Configs], bool]) -> Case:
    def checked(found: Configs, _: Path) -> None:
        assert check(found), found

    return Case(name, _written(file, content), check=checked, read=configs)


def _line(**more: object) -> str:
    return json.dumps({"prompt": "a cat", **more})


def _named(name: object, *says: str) -> Case:
    content = json.dumps({"prompt": "a cat", "output.name": name})
    return _refused(f"name {ascii(name)[:40]}", "a.jsonl", content, "line 1", "output.name", *says)


def _kept_name(name: str) -> Case:
    content = json.dumps({"prompt": "a cat", "output.name": name})
    return _right(
        f"name {ascii(name)[:40]} is fine",
        "a.jsonl",
        content,
        lambda found: found[0].output.name == name,
    )


def _key(key: str, value: object, *says: str) -> Case:
    return _refused(
        f"{key}={str(value)[:40]}",
        "a.jsonl",
        json.dumps({"prompt": "a cat", key: value}),
        "line 1",
        *says,
    )


def _place(name: str, make: Callable[[Path], Any], *says: str) -> Case:
    def made(folder: Path) -> list[str]:
        make(folder / "a.txt")
        return [str(folder / "a.txt"), *SETTINGS]

    return Case(name, made, ("a.txt", *says), read=configs)


def _device(name: str) -> Case:
    return Case(
        name,
        lambda _: [name, *SETTINGS],
        (f"{name} cannot be read as a job file", "it is not a file"),
        read=configs,
    )


def _rows(name: str, content: str, file: str = "a.csv") -> Case:
    """Return the case of a table with one job."""
    return _right(
        name,
        file,
        content,
        lambda found: (
            [(config.prompt, config.seed, config.image) for config in found] == [("x, y", 7, None)]
        ),
    )


def _is_counted(found: Configs) -> bool:
    return [(config.sample.steps, config.fps, config.frame_num) for config in found] == [(9, 8, 5)]


def _prompts(name: str, *lines: str, are: Sequence[str] | None = None, file: str = "a.txt") -> Case:
    """Return the case of prompts that are as they stand."""
    wanted = list(lines if are is None else are)
    return _right(
        name,
        file,
        "\n".join(lines),
        lambda found: [make_plan(config).prompt for config in found] == wanted,
    )


_UTF_8 = ("not UTF-8",)
_ARRAY = f"[\n  {_line(seed=7)},\n  {_line(seed=8)}\n]\n"
_OTHER_KINDS = (
    "yaml",
    "toml",
    "xlsx",
    "ods",
    "docx",
    "pdf",
    "mp4",
    "png",
    "jpg",
    "gz",
    "zip",
    "parquet",
    "py",
    "safetensors",
)

FILES = [
    _refused("nothing", "a.txt", "", "has no jobs"),
    _refused("nothing but a mark of UTF-8", "a.txt", b"\xef\xbb\xbf", "has no jobs"),
    _refused("empty lines", "a.txt", "\n\r\n   \n\t\n", "has no jobs"),
    _refused("empty jsonl", "a.jsonl", "\n\n", "has no jobs"),
    _refused("empty csv", "a.csv", "", "has no jobs"),
    _refused("keys without rows", "a.csv", "prompt,seed\n", "has no jobs"),
    _refused("comments in jsonl", "a.jsonl", "# a cat\n", "line 1: not JSON"),
    _refused("comments before jsonl", "a.jsonl", f"// cats\n{_line()}", "line 1: not JSON"),
    _place("a folder", Path.mkdir, "it is not a file"),
    _place("a pipe", os.mkfifo, "it is not a file"),
    _place("no file", lambda _: None, "No such file"),
    _place("a link to nothing", lambda path: path.symlink_to("nothing"), "No such file"),
    _place("a link to itself", lambda path: path.symlink_to(path), "symbolic links"),
    _device("/dev/zero"),
    _device("/dev/null"),
    _refused("UTF-16", "a.txt", "two cats\n".encode("utf-16"), *_UTF_8),
    _refused("UTF-16 without a mark", "a.txt", "two cats\n".encode("utf-16-le"), *_UTF_8),
    _refused("UTF-16 jsonl", "a.jsonl", _line().encode("utf-16-be"), *_UTF_8),
    _refused("UTF-32", "a.csv", "prompt\nx\n".encode("utf-32"), *_UTF_8),
    _refused("Latin-1", "a.txt", "un café\n".encode("latin-1"), *_UTF_8),
    _refused("Shift JIS", "a.txt", "猫が二匹\n".encode("shift_jis"), *_UTF_8),
    _refused("a NUL among prompts", "a.txt", b"two\0cats\n", *_UTF_8),
    _refused("a picture", "a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", *_UTF_8),
    *(
        _refused(
            f"a .{suffix}", f"a.{suffix}", "a cat\n", f"it is .{suffix}", ".txt", ".jsonl", ".csv"
        )
        for suffix in _OTHER_KINDS
    ),
    _refused("a .TXT.GZ", "a.TXT.GZ", b"\x1f\x8b\x08", "it is .gz", "unpack it"),
    _refused("a spreadsheet", "a.XLSX", b"PK\3\4", "it is .xlsx", "save it as .csv"),
    _refused(
        "a spreadsheet called .csv",
        "a.csv",
        b"PK\3\4\x14\0\6\0",
        *_UTF_8,
        "ZIP archive",
        "save it as .csv",
    ),
    _refused("gzip called .jsonl", "a.jsonl", b"\x1f\x8b\x08\0", *_UTF_8, "unpack it"),
    _refused(
        "objects called .txt", "a.txt", f"\n{_line()}\n{_line(seed=7)}", ".jsonl", "rename it"
    ),
    _refused("an array called .txt", "a.txt", _ARRAY, ".json", "rename it"),
    _refused("an array of texts called .txt", "a.txt", '["a cat", "a dog"]', ".json", "rename it"),
    _refused("an array of no name", "prompts", _ARRAY, ".json", "rename it"),
    _refused("a table called .txt", "a.txt", "prompt,seed\na cat,7\n", ".csv", "rename it"),
    _refused(
        "a page of HTML",
        "a.txt",
        "<!DOCTYPE html>\n<html>404</html>",
        "a page of HTML",
        "download it again",
    ),
    _refused(
        "a pointer of Git LFS",
        "a.csv",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "Git LFS pointer",
    ),
    _refused("rich text called .txt", "a.txt", "{\\rtf1\\ansi a cat}", "rich text"),
    _prompts(
        "a prompt that begins with @", "@home, a star", "a cat", "@", "@@x", "@ 5 pm.txt files"
    ),
    _prompts(
        "brackets in prompts",
        "[cinematic] a cat",
        "{a|b}",
        '"quoted"',
        "prompt, seed of a tree",
        "(a:1.2)",
        "null",
        "NaN",
    ),
    _prompts("punctuation of Chinese", "“一只猫”，《跑》；‘跳’。", "一只狗、一只猫：「你好」"),
    _prompts("another suffix for prompts", "a cat", "a dog", file="a.PROMPTS"),
    _prompts("no suffix for prompts", "a cat", "a dog", file="prompts"),
    _prompts(
        "files put together, each with a mark", "\ufeffa cat", "\ufeff@home", are=["a cat", "@home"]
    ),
    _prompts("@@ in JSON", '{"prompt": "@@home"}', are=["@home"], file="a.jsonl"),
    _right(
        "a mark of UTF-8", "a.txt", b"\xef\xbb\xbfa cat\n", lambda found: found[0].prompt == "a cat"
    ),
    _right(
        "a mark of UTF-8 before keys",
        "a.csv",
        b"\xef\xbb\xbfprompt\na cat\n",
        lambda found: found[0].prompt == "a cat",
    ),
    _right(
        "lines of Windows",
        "a.jsonl",
        f"{_line()}\r\n{_line(seed=7)}\r\n",
        lambda found: len(found) == 2,
    ),
    _right(
        "lines of old Macs",
        "a.txt",
        "a\rb\r",
        lambda found: [config.prompt for config in found] == ["a", "b"],
    ),
    _right(
        "no end of line",
        "a.txt",
        "a\nb",
        lambda found: [config.prompt for config in found] == ["a", "b"],
    ),
    _right(
        "form feeds in a prompt",
        "a.txt",
        "a\x0cb\x1cc\u2028d\x85e\n",
        lambda found: len(found) == 1,
    ),
    _right(
        "a comment is a prompt", "a.txt", "# a cat\n", lambda found: found[0].prompt == "# a cat"
    ),
    _right(
        "a prompt like a setting",
        "a.txt",
        "task=t2v-14B\n",
        lambda found: (found[0].prompt, found[0].task) == ("task=t2v-14B", "toy"),
    ),
    _right(
        "a prompt like a flag",
        "a.txt",
        "--multirun\n",
        lambda found: found[0].prompt == "--multirun",
    ),
    _right(
        "a long line", "a.txt", "cat " * 50_000, lambda found: len(found[0].prompt or "") == 199_999
    ),
    _right(
        "a long line of JSON",
        "a.jsonl",
        _line(prompt="cat " * 50_000),
        lambda found: len(found[0].prompt or "") == 200_000,
    ),
    _refused(
        "a prompt of megabytes",
        "a.txt",
        "cat " * 1_000_000,
        "line 1",
        "prompt has 3999999 characters",
    ),
    _refused(
        "a long cell",
        "a.csv",
        "prompt\n" + "cat " * 50_000,
        "line 2",
        "field larger than field limit",
    ),
]

OBJECTS = [
    _refused("JSON that ends early", "a.jsonl", '{"prompt": "a ca', "line 1: not JSON"),
    _refused(
        "JSON that ends early, later",
        "a.jsonl",
        f'{_line()}\n\n{{"prompt": "x",',
        "line 3: not JSON",
    ),
    _refused("JSON over several lines", "a.jsonl", '{\n"prompt": "x"\n}', "line 1: not JSON"),
    _refused("two objects in a line", "a.jsonl", _line() + _line(), "line 1: not JSON"),
    _refused("quotes of Python", "a.jsonl", "{'prompt': 'x'}", "line 1: not JSON"),
    _refused("an array", "a.jsonl", f"[{_line()}]", "line 1: not an object"),
    _refused("a text", "a.jsonl", '"a cat"', "line 1: not an object"),
    _refused("null for an object", "a.jsonl", "null", "line 1: not an object"),
    _refused("deep arrays", "a.jsonl", '{"prompt": ' + "[" * 100_000, "line 1: not JSON"),
    _refused("a number of 5000 digits", "a.jsonl", f'{{"seed": {"1" * 5000}}}', "line 1: not JSON"),
    _refused("NaN", "a.jsonl", '{"prompt": "x", "sample.shift": NaN}', "line 1: not JSON", "NaN"),
    _refused(
        "infinity",
        "a.jsonl",
        '{"prompt": "x", "sample.shift": -Infinity}',
        "line 1: not JSON",
        "Infinity",
    ),
    _refused(
        "a key twice",
        "a.jsonl",
        '{"prompt": "x", "seed": 1, "seed": 2}',
        "line 1",
        "seed is given twice",
    ),
    _refused(
        "an object in it",
        "a.jsonl",
        '{"sample": {"steps": 3}}',
        "line 1: sample is an object",
        "sample.steps",
    ),
    _refused(
        "an object for a text",
        "a.jsonl",
        '{"prompt": {"text": "x"}}',
        "line 1: prompt is an object",
    ),
    _refused(
        "an empty object", "a.jsonl", "{}\n" * 2 + '{"prompt": " "}', "line 3: prompt is empty"
    ),
    _refused(
        "an array for a text", "a.jsonl", '{"prompt": ["a", "b"]}', "line 1: prompt=", "is not text"
    ),
    _refused("true for a text", "a.jsonl", '{"prompt": true}', "line 1: prompt=", "is not text"),
    _refused("an array for a number", "a.jsonl", _line(seed=[1, 2]), "line 1: seed"),
    _refused("a text for a number", "a.jsonl", _line(seed="many"), "line 1: seed", "Integer"),
    _refused("true for a number", "a.jsonl", _line(seed=True), "line 1: seed"),
    _refused("half a frame", "a.jsonl", _line(frame_num=1.5), "line 1: frame_num", "Integer"),
    _refused(
        "1e400",
        "a.jsonl",
        '{"prompt": "x", "sample.shift": 1e400}',
        "line 1: sample.shift",
        "finite",
    ),
    _refused(
        "half a surrogate", "a.jsonl", '{"prompt": "a \\ud83d cat"}', "line 1: prompt", "UTF-8"
    ),
    _refused(
        "a NUL in a path",
        "a.jsonl",
        '{"prompt": "x", "ckpt_dir": "a\\u0000b"}',
        "line 1: ckpt_dir",
        "NUL",
    ),
    _refused(
        "a NUL in a place",
        "a.jsonl",
        '{"prompt": "x", "output.dir": "a\\u0000b"}',
        "line 1: output.dir",
        "NUL",
    ),
    _right(
        "a NUL in a prompt",
        "a.jsonl",
        '{"prompt": "a\\u0000cat"}',
        lambda found: found[0].prompt == "a\0cat",
    ),
    _right(
        "numbers in texts",
        "a.jsonl",
        _line(prompt=5, size="32*32"),
        lambda found: (found[0].prompt, found[0].size) == ("5", "32*32"),
    ),
    _right(
        "an interpolation in a prompt",
        "a.jsonl",
        _line(prompt="${oc.env:HOME}"),
        lambda found: found[0].prompt == "${oc.env:HOME}",
    ),
    _right(
        "a sweep in a prompt",
        "a.jsonl",
        _line(prompt="a,b"),
        lambda found: found[0].prompt == "a,b",
    ),
    _right(
        "whole numbers as floats in JSON",
        "a.jsonl",
        _line(steps=9.0, fps=8.0, frame_num=5.0),
        _is_counted,
    ),
    _right(
        "null for a number",
        "a.jsonl",
        _line(seed=None, steps=None, image=None),
        lambda found: found[0].seed == 42,
    ),
    _right(
        "an array in .json",
        "a.json",
        _ARRAY,
        lambda found: [config.seed for config in found] == [7, 8],
    ),
    _right(
        "objects a line in .json",
        "a.json",
        f"{_line(seed=7)}\n{_line(seed=8)}",
        lambda found: len(found) == 2,
    ),
    _right(
        "one object in .json",
        "a.json",
        '{\n"prompt": "x",\n"seed": 7}',
        lambda found: found[0].seed == 7,
    ),
    _right(
        "objects in .ndjson",
        "A.NDJSON",
        f"{_line(seed=7)}\n{_line(seed=8)}",
        lambda found: len(found) == 2,
    ),
    _refused(
        "a broken array in .json", "a.json", f"[\n{_line()}\n{_line()}\n]", "line 3: not JSON"
    ),
    _refused(
        "an array of texts in .json", "a.json", '[\n"a cat"\n]', "line 2: not an object of settings"
    ),
    _refused(
        "a wrong key in .json",
        "a.json",
        f'[\n{_line()},\n\n{{"promt": "x"}}]',
        "line 4: unknown key 'promt'",
    ),
    _refused("a number in .json", "a.json", "5", "line 1: not an object"),
    _refused("nothing in .json", "a.json", " \n", "has no jobs"),
    _refused("deep arrays in .json", "a.json", "[" * 100_000, "not JSON"),
    _refused(
        "an array over lines in .jsonl", "a.jsonl", _ARRAY, "line 1: not JSON", "read from .json"
    ),
    _right(
        "null", "a.jsonl", _line(**{"cache.dir": None}), lambda found: found[0].cache.dir is None
    ),
]

KEYS = [
    _key("promt", "x", "unknown key 'promt'", "did you mean 'prompt'"),
    _key("", "x", "unknown key ''"),
    _key("hydra.run.dir", "elsewhere", "unknown key 'hydra.run.dir'"),
    _key("hydra/launcher", "joblib", "unknown key 'hydra/launcher'"),
    _key("hydra.mode", "MULTIRUN", "unknown key 'hydra.mode'"),
    _key("hydra.callbacks.x._target_", "os.system", "unknown key 'hydra.callbacks.x._target_'"),
    _key("+hydra.callbacks", {"_target_": "os.system"}, "+hydra.callbacks is an object"),
    _key("+new", 1, "unknown key '+new'"),
    _key("++seed", 1, "unknown key '++seed'"),
    _key("~task", None, "unknown key '~task'"),
    _key("~prompt", "", "unknown key '~prompt'"),
    _key("--multirun", "x", "unknown key '--multirun'"),
    _key("--config-dir", "x", "unknown key '--config-dir'"),
    _key("task@sample", "toy", "unknown key 'task@sample'"),
    _key("prompt=x seed", 5, "unknown key 'prompt=x seed'"),
    _key("sample\n.steps", 5, "unknown key 'sample\\n.steps'"),
    _key("\x1b[31mseed", 5, "unknown key '\\x1b[31mseed'"),
    _key("seed", "1,2", "seed=1,2", "one value"),
    _key("seed", "range(1,3)", "seed", "one value"),
    _key("sample.steps", "${oc.env:HOME}", "sample.steps", "${"),
    _key("sample.guide_scale", ["${oc.env:HOME}", 1], "sample.guide_scale", "${"),
    _key("sample.guide_scale", "${oc.env:HOME}", "sample.guide_scale", "${"),
    _key("sample.shift", "${seed}", "sample.shift", "${"),
    _key("task", "../../etc/passwd", "there is no task '../../etc/passwd'"),
    _key("task", "t2v", "there is no task 't2v'", "t2v-1.3B"),
    _key("task", None, "there is no task"),
    _key("task", ["toy", "t2v-14B"], "task"),
    _key("output", "x", "output"),
    _right(
        "a task",
        "a.jsonl",
        _line(task="t2v-1.3B", size="64*64"),
        lambda found: (found[0].task, found[0].fps) == ("t2v-1.3B", 16),
    ),
]

TABLES = [
    _refused("a cell too few", "a.csv", "prompt,seed\nx\n", "line 2: 1 values for the 2 keys"),
    _refused("a cell too many", "a.csv", "prompt\nx,y\n", "line 2: 2 values for the 1 keys"),
    _refused(
        "a comma in a prompt without quotes",
        "a.csv",
        "prompt,seed\ntwo cats, boxing,7\n",
        "line 2: 3 values for the 2 keys",
    ),
    _refused("quotes that stay open", "a.csv", 'prompt\n"x\ny\n', "not a table"),
    _refused("text after quotes", "a.csv", 'prompt\n"x" y\n', "not a table"),
    _refused(
        "a column twice", "a.csv", "prompt,seed,seed\nx,1,2\n", "line 1", "seed is given twice"
    ),
    _refused("a column without a key", "a.csv", "prompt,\nx,y\n", "line 2: unknown key ''"),
    _refused(
        "columns of row numbers", "a.csv", ",prompt\n0,x\n", "line 2: unknown key ''", "index=False"
    ),
    _refused(
        "a comma of Chinese",
        "a.csv",
        "prompt，seed\nx，7\n",
        "line 2: unknown key 'prompt，seed'",
        "did you mean 'prompt'",
    ),
    _refused(
        "names but for case",
        "a.csv",
        "prompt,name\nx,Clip\nz,clip\n",
        "line 3: output.name=clip",
        "line 2 (Clip)",
    ),
    _refused(
        "names but for accents' form",
        "a.csv",
        "prompt,name\nx,café\nz,cafe\u0301\n",
        "line 3: output.name=",
        "line 2 (café)",
    ),
    _refused(
        "a seed that lost digits",
        "a.csv",
        "prompt,seed\nx,1.2345678901234567e+19\n",
        "line 2: seed",
        "Integer",
    ),
    _refused(
        "a mark of UTF-16 before keys",
        "a.csv",
        "prompt\nx\n".encode("utf-16"),
        "UTF-16",
        *_UTF_8,
        "save it as UTF-8",
    ),
    _rows("semicolons", "prompt;seed\nx, y;7\n"),
    _rows("tabs in .csv", "prompt\tseed\nx, y\t7\n"),
    _rows("bars", "prompt|seed\nx, y|7\n"),
    _rows("tabs in .tsv", "prompt\tseed\nx, y\t7\n", file="a.tsv"),
    _rows("a separator named first", 'sep=,\nprompt,seed\n"x, y",7\n'),
    _rows("a separator in quotes, lines of Windows", '"sep=;"\r\nprompt;seed\r\nx, y;7\r\n'),
    _rows(
        "a mark of UTF-8, a named separator, an old Mac's lines",
        "\ufeffsep=;\rprompt;seed\rx, y;7\r",
    ),
    _rows("a whole number as a float", 'prompt,seed\n"x, y",7.0\n'),
    _rows("a whole number with a decimal comma", "prompt;seed\nx, y;7,0\n"),
    _rows("empty columns and rows at the end", 'prompt,seed,,\n"x, y",7,,\n,,,\n,,,\n'),
    _rows("empty cells more than keys", 'prompt,seed\n"x, y",7,,\n'),
    _rows("cells of NaN", 'prompt,seed,image,shift,steps,name\n"x, y",7,NaN,nan,<NA>,#N/A\n'),
    _right(
        "a number with a decimal comma",
        "a.csv",
        "prompt;shift\nx;2,5\n",
        lambda found: found[0].sample.shift == 2.5,
    ),
    _right(
        "whole numbers as floats", "a.csv", "prompt,steps,fps,frames\nx,9.0,8.,5.00\n", _is_counted
    ),
    _refused("no keys", "a.csv", "a cat\na dog\n", "line 2: unknown key 'a cat'"),
    _refused("a seed of 5000 digits", "a.csv", f"prompt,seed\nx,{'1' * 5000}\n", "line 2: seed"),
    _refused("a negative seed", "a.csv", "prompt,seed\nx,-7\n", "line 2: seed=-7"),
    _refused("a seed that is half", "a.csv", "prompt,seed\nx,7.5\n", "line 2: seed", "Integer"),
    _refused(
        "a link in a cell",
        "a.csv",
        'prompt,sample.steps\nx,"=HYPERLINK(1)"\n',
        "line 2",
        "sample.steps==HYPERLINK(1)",
    ),
    _right(
        "lines in a cell",
        "a.csv",
        'prompt,seed\n"a\nb",7\nc,8\n',
        lambda found: [config.seed for config in found] == [7, 8],
    ),
    _right(
        "spaces around keys, empty rows",
        "a.csv",
        "prompt , seed\n\nx,\n",
        lambda found: (found[0].prompt, found[0].seed) == ("x", 42),
    ),
]

NAMES = [
    _named("../x", "plain file name"),
    _named("/tmp/x", "plain file name"),
    _named("a/../../x", "plain file name"),
    _named(".", "plain file name"),
    _named("..", "plain file name"),
    _named(".hidden", "plain file name"),
    _named("", "plain file name"),
    _named("  ", "plain file name"),
    _named("a\0b", "plain file name"),
    _named("a\nb", "plain file name"),
    _named("a\x1b[31mb", "plain file name"),
    _named("cat\u202egpm.4", "plain file name"),
    _named("\udce4", "plain file name"),
    _named("x.latents", "end in .latents"),
    _named("x.Latents.mp4", "end in .latents"),
    _named("x.2f1d0c9b8a7e.state", "end in .state"),
    _named("x" * 300, "300 bytes"),
    _named("猫" * 100, "300 bytes"),
    _named(["x"], "is not text"),
    _named({"x": 1}, "is an object"),
    _named(True, "is not text"),
    _refused(
        "two of a name",
        "a.csv",
        "prompt,output.name\nx,y\nz,y\n",
        "line 3: output.name=y is that of line 2",
    ),
    _right("two of the same", "a.txt", "a cat\na cat\n", lambda found: len(found) == 1),
    _refused(
        "a name with a suffix",
        "a.csv",
        "prompt,output.name\nx,y\nx,y.mp4\n",
        "line 3: output.name=y is that of line 2",
    ),
    _refused(
        "a name as text and number",
        "a.jsonl",
        "\n".join(_line(**{"output.name": name}) for name in ("5", 5)),
        "is that of line 1",
    ),
    _right(
        "a long name of the file itself", f"{'x' * 240}.txt", "a cat", lambda found: len(found) == 1
    ),
    *(
        _kept_name(name)
        for name in ("index", "runs", "logs", "latents", "x.json", "x.latents.2", "estate")
    ),
    _kept_name("-dash"),
    _kept_name("CON"),
    _kept_name("what? 100%: a*b|<c>\\d"),
    _kept_name("👩‍👧 猫 é"),
    _kept_name("$(touch ran) `touch ran`; touch ran"),
]

CASES = [*FILES, *OBJECTS, *KEYS, *TABLES, *NAMES]
