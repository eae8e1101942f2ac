"""The data: which rows are kept and why, what a prompt says, the order of the stream, and the hub.

The hub is a small HTTP server on the loopback interface that serves a folder as the real one does.
"""

import copy
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

import data
import grpo
import reward
import tasks
import tasks.answers
from tools import check_data
from conftest import ROOT, ROWS, SHARED, fault_in_real_md
from data import Example
from lib import parallel
from lib.config import BadInput

REAL = SHARED / "data" / "recode-train-data.jsonl"


def test_good_rows(rows, write_rows):
    """Rows in another order, or a version with its "==", would make another prompt of the same
    data.
    """
    rows[1]["new_version"], rows[2]["new_version"], rows[3]["new_version"] = (
        "2.0.1",
        None,
        "== 1.0rc1",
    )
    rows[4] |= {"description": None, "extra": 1}
    examples = data.load_examples(write_rows([*rows[:3], "", "  ", *rows[3:]]), dropped := {})
    assert [vars(example).keys() for example in examples] == [ROWS[0].keys()] * 6 and not dropped
    assert [example.new_version for example in examples] == [
        "2.0",
        "2.0.1",
        "",
        "1.0rc1",
        "2.0",
        "2.0",
    ]
    for example, row in zip(examples, rows):
        texts = {name: row[name] if row[name] is not None else "" for name in ROWS[0]}
        assert example == Example(**texts | {"new_version": example.new_version})


DROPPED = {
    "no update note or no code": [
        {"update_info": None},
        {"old_code": ""},
        {"new_code": None},
        {"dependency": ""},
    ],
    "not valid Unicode": [{"old_code": "x = '\ud800'"}, {"description": "\udc80"}],
    "the reference does not parse": [
        {"new_code": "x = ("},
        {"new_code": "x = '\0'"},
        {"new_code": "(" * 5000},
    ],
    "repeat of an earlier row": [{"description": "another", "new_version": "9"}],
}


@pytest.mark.parametrize("reason", DROPPED)
def test_dropped_rows(rows, write_rows, reason):
    """A row that teaches nothing or the wrong thing stays, or goes without being counted."""
    for change in DROPPED[reason]:
        source = write_rows([rows[0], rows[1], rows[0] | change])
        examples = data.load_examples(source, dropped := {})
        assert dropped == {reason: [f"{source}, line 3"]}
        assert examples == data.load_examples(write_rows(rows[:2]))


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_windows_line_ends(rows, write_rows, ending):
    """Stops a right answer with "\\n" from being no exact match, a copy from not being stale, and
    prompts and targets with "\\r\\n" or a byte order mark."""
    rows[1]["update_info"] += "\nand more\n"
    expected = data.load_examples(write_rows(rows))
    for row in rows:
        row |= {key: "\ufeff" + text.replace("\n", ending) for key, text in row.items()}
    assert data.load_examples(write_rows(rows)) == expected
    problem = {"task_id": "a", "prompt": f"def f():{ending}", "canonical_solution": "    0{ending}"}
    source = write_rows([problem | {"test": f"{ending}pass", "entry_point": "f"}])
    (problem,) = tasks.load("humaneval", source, plain=True)
    assert "\r" not in problem.question + problem.setup + problem.reference + problem.tests[0]


@pytest.mark.parametrize("blank", [" ", "\n\t\n", "# a comment", "\n  # a\n\n# b "])
@pytest.mark.parametrize("name", ["dependency", "update_info", "old_code", "new_code"])
def test_blank_fields(rows, write_rows, name, blank):
    """Stops a row without a reference, for which an empty answer earns 3.0, or without a note."""
    source = write_rows([rows[0], rows[1] | {name: blank}])
    count = len(data.load_examples(source, dropped := {}))
    kept = "#" in blank and not name.endswith("code")
    assert count == 1 + kept
    assert dropped == ({} if kept else {"no update note or no code": [f"{source}, line 2"]})


def refusal(call, *args):
    """The one-line message of the BadInput that call(*args) must raise."""
    with pytest.raises(BadInput) as error:
        call(*args)
    message = str(error.value)
    assert message and "\n" not in message
    return message


BROKEN = [
    ("{'a': 1}", "not JSON"), ('{"dependency": ', "not JSON"), ("[" * 100_000, "not JSON"),
    ("[1]", "object but list"),
    ("null", "not a JSON object"),
    (json.dumps(ROWS[2] | {"new_code": 7}), "'new_code' is not text"),
    (json.dumps(ROWS[2] | {"update_info": ["a\nb"] * 99}), "'update_info' is not text"),
]  # fmt: skip
for name in ROWS[2]:
    others = {key: value for key, value in ROWS[2].items() if key != name}
    BROKEN.append((json.dumps(others), f"{name!r} is missing"))


def test_broken_line(rows, write_rows):
    """A traceback, or a message that leaves the reader to search a thousand lines for the bad one.
    """
    for line, words in BROKEN:
        message = refusal(data.load_examples, write_rows([rows[0], "", line, rows[1]]))
        assert "data.jsonl, line 3: " in message and words in message and len(message) < 300


def test_unusable_file(tmp_path, rows, write_rows):
    """A file that is missing, empty, not text or without a usable row ends in a traceback or an
    empty run.
    """
    (tmp_path / "bytes.jsonl").write_bytes(
        json.dumps(rows[0]).encode() + b'\n{"dependency": "\xff\xfe"}\n'
    )
    message = refusal(data.load_examples, str(tmp_path / "bytes.jsonl"))
    assert "bytes.jsonl, line 2" in message and "UTF-8" in message.upper().replace("UTF8", "UTF-8")
    for missing in (str(tmp_path / "none.jsonl"), str(tmp_path), "none", "some/none.jsonl", ""):
        assert repr(missing) in refusal(data.load_examples, missing)
    for content in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        message = refusal(data.load_examples, str(tmp_path / "empty.jsonl"))
        assert (
            "empty.jsonl" in message
            and "no usable row" in message
            and "empty" in message.split("': ")[1]
        )
    useless = [
        rows[0] | {"new_code": "x = ("},
        rows[1] | {"new_code": ")"},
        rows[2] | {"old_code": None},
    ]
    message = refusal(data.load_examples, write_rows(useless))
    assert all(
        word in message
        for word in ("data.jsonl", "no usable row", "2 the reference", "1 no update note")
    )


@pytest.mark.skipif(not REAL.is_file(), reason="the real data set is not there")
def test_real_data():
    """A check that became too strict or too lax shows in what is left of the paper's own data."""
    examples = data.load_examples(str(REAL), dropped := {})
    counts = {reason: len(places) for reason, places in dropped.items()}
    assert len(examples) == 1616 and sum(counts.values()) == 1781 - 1616
    assert counts["no update note or no code"] == 51  # 30 have code of comments only
    assert counts["the reference does not parse"] == 50
    assert counts["repeat of an earlier row"] == 64
    assert not any(example.new_version.startswith("=") for example in examples)


def test_split_heldout(write_rows):
    """Held-out rows that are trained on as well, that change from run to run, or that are none at
    all.
    """
    examples = [Example(**ROWS[0] | {"update_info": str(i)}) for i in range(40)]
    train, heldout = data.split_heldout("0.2", examples, 1)
    assert len(heldout) == 8 and sorted(train + heldout, key=examples.index) == examples
    assert train == sorted(train, key=examples.index) and data.split_heldout(
        "0.2", examples, 1
    ) == (train, heldout)
    assert data.split_heldout(".2", examples, 2)[1] != heldout
    assert data.split_heldout("", examples, 1) == (examples, [])
    from_file = data.split_heldout(write_rows(ROWS[:2]), examples, 1)
    assert from_file == (examples, data.load_examples(write_rows(ROWS[:2])))


def test_split_heldout_by_note(write_rows):
    """Stops a held-out row whose note, hence its answer, was seen in training with other code."""
    places = [
        (library, note, i) for i in range(5) for note in "abcdef" for library in ("one", "two")
    ]
    examples = [
        Example(**ROWS[0] | {"dependency": library, "update_info": note, "old_code": f"x = {i}"})
        for library, note, i in places
    ]
    train, heldout = data.split_heldout("0.25", examples, 42)
    sides = [{(e.dependency, e.update_info) for e in side} for side in (train, heldout)]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [9, 3]
    assert (len(train), len(heldout)) == (45, 15)
    assert [sorted(side, key=examples.index) for side in (train, heldout)] == [train, heldout]
    # the order of the rows decides nothing, nor does the process: sets have another order in each
    again = data.split_heldout("0.25", examples[::-1], 42)
    assert again == (train[::-1], heldout[::-1])
    source = write_rows([vars(e) for e in examples])
    code = "import data, sys; rows = data.load_examples(sys.argv[1])"
    code += "; print(data.split_heldout('0.25', rows, 42)[1])"
    shown = {
        python(os.environ | {"PYTHONHASHSEED": seed}, "-c", code, source).stdout for seed in "12"
    }
    assert [eval(text) for text in shown] == [
        data.split_heldout("0.25", data.load_examples(source), 42)[1]
    ]


@pytest.mark.skipif(not REAL.is_file(), reason="the real data set is not there")
def test_split_heldout_real_data(monkeypatch):
    """Stops a split that has changed since real.md's runs, whose metrics are on these rows.

    At that time code of comments only was kept, and its notes took part in the split.
    """
    train, heldout = data.split_heldout("0.1", data.load_examples(str(REAL)), 42)
    assert (len(train), len(heldout)) == (1456, 160)
    assert not {e.update_info for e in train} & {e.update_info for e in heldout}
    monkeypatch.setattr(data, "fault", fault_in_real_md)
    train, heldout = data.split_heldout("0.1", data.load_examples(str(REAL)), 42)
    assert (len(train), len(heldout)) == (1481, 165)


def test_bad_heldout(rows, write_rows):
    """A share that leaves nothing to train on or to measure, or that is no number, is found out
    late.
    """
    examples = data.load_examples(write_rows(rows))
    for heldout in ("0", "0.01", "1", "1.0", "7", ".", "0.0.1", "-0.1", "none.jsonl"):
        assert heldout in refusal(data.split_heldout, heldout, examples, 1)


def test_prompt_through_the_chat_template(tokenizer):
    """A closed assistant turn, or a prompt put together by hand, is not what the model was trained
    on.
    """
    changes = {
        "new_version": "2.0",
        "old_code": "x = f'{a}'  # {new_code} {0}",
        "description": "hidden",
    }
    example = Example(**ROWS[0] | changes)
    ids = data.encode_prompt(example, tokenizer)
    user = data.USER.format(**vars(example))
    contents = {
        "system": data.SYSTEM,
        "user": user,
        "assistant": "Let me solve this step by step.\n<think>",
    }
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    open_turn = tokenizer.apply_chat_template(
        messages, continue_final_message=True, return_dict=False
    )
    assert ids == open_turn and all(type(i) is int for i in ids)
    text = tokenizer.decode(ids)
    assert (
        text.endswith("<think>") and tokenizer.eos_token not in text[text.rindex("Let me solve") :]
    )
    for shown in (
        "mathlib",
        "2.0",
        f"<doc>\n{ROWS[0]['update_info']}\n</doc>",
        f"```python\n{example.old_code}\n```",
    ):
        assert shown in user and shown in text
    assert "hidden" not in text and "double_0(4)" not in text and "==" not in text


def test_prompt_without_chat_template(tokenizer):
    """A base model's tokenizer has no chat template; a prompt without one of the parts, or a
    traceback.
    """
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    text = plain.decode(data.encode_prompt(Example(**ROWS[1]), plain))
    user = data.USER.format(**ROWS[1])
    assert text == f"{data.SYSTEM}\n\n{user}\n\nLet me solve this step by step.\n<think>"


ROLES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "own": (ROOT / "tiny" / "chat_template.jinja").read_text(),
    "trim": ROLES.replace("CONTENT", "m.content | trim"),
    "repeat": ROLES.replace("CONTENT", "m.content ~ '<|endoftext|>' ~ m.content"),
    "json": ROLES.replace("CONTENT", "m.content ~ (messages | tojson)"),
    "user only": "{% for m in messages if m.role == 'user' %}<|im_end|>{{ m.content }}{% endfor %}",
    "last only": "<|im_start|>{{ messages[-1].content }}<|im_end|>\n",
    "own system": "<|im_start|>be kind<|im_end|>{{ messages[-1].content }}<|im_end|>",
    "none": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_that_looks_like_a_special_token(tokenizer, write_rows, template):
    """Stops a second EOS in a target, and a prompt whose turn ends in a note, code or question.

    Oracle: the same text with "!" for "|", as the toy's tokenizer has a token for every byte.
    """
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = TEMPLATES[template]
    special = [token.content for token in copied.added_tokens_decoder.values() if token.special]
    looks = f"<|im_<|im_end|>end|> {' '.join(special)}{special[0]}{'0'.join(2 * special)}"
    assert len(special) == 3 and len(copied.encode(looks)) < len(looks)
    found = []
    for text in (looks, looks.replace("|", "!")):
        example = Example(**{name: f"{text} {value} {text}" for name, value in ROWS[0].items()})
        row = {"task_id": "a", "prompt": f'def f():\n    """{text}"""', "canonical_solution": "0"}
        source = write_rows([row | {"test": "pass", "entry_point": "f"}])
        problems = [tasks.load("humaneval", source, plain=plain)[0] for plain in (False, True)]
        ids = [problem.encode(copied) for problem in problems]
        ids += [data.encode_prompt(example, copied), data.encode_target(example, copied)]
        found.append(ids)
    bar, bang = copied.encode("|!")
    for ids, plain in zip(*found):
        assert bar in ids and ids == [bar if i == bang else i for i in plain]
    assert found[0][-1].count(copied.eos_token_id) == 1


@pytest.mark.parametrize("template", ["user only", "last only", "own system"])
def test_template_without_the_system_message(tokenizer, template):
    """Stops a template that drops the system message from losing the instruction."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = TEMPLATES[template]
    text = copied.decode(data.encode_prompt(Example(**ROWS[0]), copied))
    user = data.USER.format(**ROWS[0])
    assert text.count(f"{data.SYSTEM}\n\n{user}") == text.count(user) == 1
    copied.chat_template = "<|im_start|>be kind<|im_end|>"
    assert "chat template drops" in refusal(data.encode_prompt, Example(**ROWS[0]), copied)


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{{ messages + 1 }}", "{{ messages[5].content.x }}", {"rag": "", "tools": ""}],
    ids=["ZeroDivisionError", "TypeError", "UndefinedError", "no default"],
)
def test_template_that_raises(tokenizer, write_rows, template):
    """Stops a traceback where a template raises something else than a TemplateError."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    row = {"task_id": "a", "prompt": "def f():", "canonical_solution": "0", "entry_point": "f"}
    (problem,) = tasks.load("humaneval", write_rows([row | {"test": "pass"}]), plain=True)
    for call, *args in ((data.encode_prompt, Example(**ROWS[0]), copied), (problem.encode, copied)):
        assert "model: the tokenizer's chat template does not work: " in refusal(call, *args)


def test_tokenizer_that_appends_eos(tokenizer):
    """Stops a prompt that ends with EOS, and a target that ends with two."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = None
    example = Example(**ROWS[0])
    expected = data.encode_prompt(example, copied), data.encode_target(example, copied)
    start, end = copied.encode("<|im_start|><|im_end|>")
    special = [("<|im_start|>", start), ("<|im_end|>", end)]
    form = "<|im_start|> $A <|im_end|> <|im_end|>"
    copied.backend_tokenizer.post_processor = TemplateProcessing(form, special_tokens=special)
    assert copied.encode("a")[1:] == [*tokenizer.encode("a"), end, end]
    assert data.encode_prompt(example, copied) == [start, *expected[0]]
    assert data.encode_target(example, copied) == expected[1]


def test_long_prompts(tokenizer):
    """A prompt over the limit is trained on, or one at the limit is not."""
    examples = [
        Example(**ROWS[i] | {"old_code": "x = 1\n" * (1 + 40 * (i == 1))}) for i in range(3)
    ]
    prompts = [data.encode_prompt(example, tokenizer) for example in examples]
    limit = max(len(prompts[0]), len(prompts[2]))
    kept = data.encode_tasks(examples, tokenizer, limit)
    assert kept == [(prompts[0], examples[0]), (prompts[2], examples[2])]
    assert len(data.encode_tasks(examples, tokenizer, len(prompts[1]))) == 3
    shortest = min(map(len, prompts))
    message = refusal(data.encode_tasks, examples, tokenizer, shortest - 1)
    assert f"max-prompt-tokens {shortest - 1}" in message and f"{shortest} tokens" in message


def test_draw():
    """A stream that repeats or skips tasks, or that a resumed run meets in another order."""
    tasks = [f"task {i}" for i in range(7)]
    stream = data.draw(tasks, 0, 70, 5)
    epochs = [stream[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == tasks for epoch in epochs) and len(set(map(tuple, epochs))) > 5
    assert stream == data.draw(tasks, 0, 70, 5) and tasks == sorted(tasks)
    for size in (1, 2, 3, 10):
        assert (
            sum([data.draw(tasks, i, min(size, 70 - i), 5) for i in range(0, 70, size)], [])
            == stream
        )
    assert data.draw(tasks, 0, 70, 6) != stream
    assert data.draw(tasks[:1], 3, 4, 5) == tasks[:1] * 4


@pytest.fixture
def hub(tmp_path, rows, write_rows, checkpoints):
    """(environment, requests): a hub on loopback with acme/toy-model and acme/Toy-Data, no cache
    yet.
    """
    root, requests = tmp_path / "hub", []
    shutil.copytree(checkpoints["qwen2"], root / "acme/toy-model")
    (root / "datasets/acme/Toy-Data").mkdir(parents=True)
    shutil.move(write_rows(rows), root / "datasets/acme/Toy-Data/toy-data.jsonl")

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(f"{self.command} {self.path}")
            path, headers = urllib.parse.urlsplit(self.path).path, {"X-Repo-Commit": "0" * 40}
            repo = root / re.sub(r"^/(api/models/)?|/(resolve|tree)/main.*", "", path)
            name, content = path.partition("/resolve/main/")[2], None
            files = [
                {"path": file.name, "rfilename": file.name, "type": "file", "oid": "0"}
                for file in repo.glob("*")
            ]
            if name and (repo / name).is_file():
                content = (repo / name).read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            elif path.endswith("/tree/main"):
                content = json.dumps(files).encode()
            elif path == f"/api/models/{repo.relative_to(root)}" and files:
                content = json.dumps(
                    {"id": path[len("/api/models/") :], "siblings": files}
                ).encode()
            else:
                headers["X-Error-Code"] = "EntryNotFound" if files else "RepoNotFound"
            self.send_response(404 if content is None else 200)
            for header in (headers | {"Content-Length": str(len(content or b""))}).items():
                self.send_header(*header)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_HEAD = do_GET
        log_message = lambda *_: None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    address = f"http://127.0.0.1:{server.server_port}"
    yield (
        inherited
        | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"},
        requests,
    )
    server.shutdown()
    server.server_close()


def python(env, *argv):
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


LOAD = "import data, sys; print([e.update_info for e in data.load_examples(sys.argv[1])])"


@pytest.mark.slow
def test_hub(hub, tmp_path):
    """A wrong file name, repository type or cache makes --data and --model work with local files
    only.
    """
    env, requests = hub
    expected = [row["update_info"] for row in ROWS]
    assert eval(python(env, "-c", LOAD, "acme/Toy-Data").stdout) == expected
    assert "GET /datasets/acme/Toy-Data/resolve/main/toy-data.jsonl" in requests
    fetched = len(requests)
    assert (
        eval(python(env | {"HF_HUB_OFFLINE": "1"}, "-c", LOAD, "acme/Toy-Data").stdout) == expected
    )
    assert len(requests) == fetched  # the cache is enough
    flags = "--model acme/toy-model --data acme/Toy-Data --steps 1"
    flags += " --num-samples 2 --max-new-tokens 8 --r 4"
    done = python(env, "grpo.py", *flags.split(), "--output", str(tmp_path / "run"))
    assert (
        done.returncode == 0
        and "6 kept" in done.stdout
        and (tmp_path / "run/adapter").is_dir()
    )
    assert "GET /acme/toy-model/resolve/main/model.safetensors" in requests


REFUSED = """
import sys, time; time.sleep = lambda seconds: None  # between the hub's retries
import grpo
from lib import parallel
rows, output = sys.argv[1:]
for source in (["--data", rows, "--model", "acme/none"], ["--data", "acme/None"]):
    sys.argv[1:] = ["--output", output, *source]
    try:
        parallel.run_main(grpo.main)
    except SystemExit as error:
        print(error.code)
"""


@pytest.mark.parametrize(
    "trouble", [pytest.param("no such repository", marks=pytest.mark.slow), "no network"]
)
def test_hub_out_of_reach(hub, write_rows, rows, tmp_path, trouble):
    """Without network, or with a mistyped id, a screen of retries and tracebacks instead of one
    line each.
    """
    env, _ = hub
    if trouble == "no network":
        env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = python(env, "-c", REFUSED, write_rows(rows), str(tmp_path / "run"))
    lines = done.stderr.splitlines()
    assert done.stdout.split() == ["2", "2"] and len(lines) == 2, done.stderr
    assert (
        lines[0].startswith("error: model: ")
        and "acme/none" in lines[0]
        and "directory" in lines[0]
    )
    assert lines[1].startswith("error: data: ") and "acme/None" in lines[1] and "local" in lines[1]
    assert not (tmp_path / "run").exists()


def look(capsys, *argv):
    """The lines that `python -m tools.check_data` prints."""
    assert check_data.main(list(argv)) == 0
    return capsys.readouterr().out.split("\n")


def test_own_data_set(rows, write_rows, tokenizer, tmp_path, capsys):
    """Stops a report that miscounts, names the wrong lines, or hides how long the texts are."""
    rows[1]["old_code"] += "\n# more" * 30
    rows[2]["new_code"] = rows[2]["old_code"] + "  # the same"
    bad = [rows[0] | {"new_code": "("} for _ in range(7)]
    source = write_rows([rows[0], "", *bad, rows[1], rows[0], *rows[2:]])
    model = shutil.copytree(ROOT / "tiny", tmp_path / "model")
    limits = {"max_prompt_tokens": 200, "max_new_tokens": 30}
    (model / "defaults.json").write_text(json.dumps(limits))
    lines = look(capsys, source, "--model", str(model))
    assert lines[0].endswith("6 usable rows, 8 dropped")
    assert "          7 dropped: the reference does not parse (line 3, 4, 5, 6, 7, ...)" in lines
    assert "          1 dropped: repeat of an earlier row (line 11)" in lines
    assert [line.split()[:2] for line in lines if "no change" in line] == [["1", "usable"]]
    examples = [Example(**row | {"new_version": "2.0"}) for row in rows]
    prompts = sorted(len(data.encode_prompt(example, tokenizer)) for example in examples)
    targets = sorted(len(data.encode_target(example, tokenizer)) for example in examples)
    assert prompts[-1] > 200 > prompts[-2]
    for name, counts, limit in (("prompt", prompts, 200), ("reference", targets, 30)):
        (line,) = [line.split() for line in lines if line.startswith(name + " ") and "over" in line]
        middle = (counts[2] + counts[3]) / 2
        assert line[1] == f"{middle:.0f}"
        assert line[2:4] == [str(counts[5])] * 2  # 90 % of six is six
        assert int(line[4]) == sum(count > limit for count in counts) and line[-1] == str(limit)


def test_own_data_set_shows_prompts(rows, write_rows, capsys):
    """Stops prompts that are cut, too wide or too long, or that send commands to the terminal."""
    rows[0]["update_info"] = "a long note " * 20 + "\x1b[2J the end"
    rows[5]["old_code"] = "x = 1\n" * 200
    lines = look(capsys, write_rows(rows))
    text = " ".join(line.removeprefix("    | ").strip() for line in lines)
    assert sum("usable row " in line for line in lines) == 3
    assert "long note a long note ?[2J the end" in text
    assert max(map(len, lines[1:])) <= 100 and len(lines) < 150
    assert any("lines more" in line for line in lines)
    assert "\x1b" not in text and any("by the tokenizer of" in line for line in lines)
    assert sum("usable row " in line for line in look(capsys, write_rows(rows[:1]))) == 1


def test_own_data_set_as_a_program(write_rows, rows, monkeypatch, capsys):
    """Stops an exit status or a traceback that hides that nothing is usable."""

    def printed(content):
        monkeypatch.setattr(sys, "argv", ["check_data.py", write_rows(content)])
        with pytest.raises(SystemExit) as stop:
            parallel.run_main(check_data.main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        return err

    err = printed([rows[0] | {"old_code": ""}])
    assert err.startswith("error: data: no usable row") and err.endswith("data.jsonl, line 1\n")
    assert "1 no update note or no code, e.g. " in err
    assert "line 1: not JSON" in printed(["{"])


def test_own_data_set_is_split(write_rows, rows, tmp_path, capsys):
    """Stops a split that loses, repeats or spoils a row, that differs from --heldout's, or that
    overwrites one on which a model was trained."""
    rows += [row | {"update_info": f"é {row['update_info']}", "old_code": "y"} for row in rows]
    source = write_rows([*rows, rows[0] | {"new_code": "("}, rows[1]])
    lines = look(capsys, source, "--split", "0.25", str(tmp_path / "new/mine"))
    examples = data.load_examples(source)
    parts = [
        data.load_examples(str(tmp_path / f"new/mine/{name}.jsonl"))
        for name in ("train", "heldout")
    ]
    assert parts == list(data.split_heldout("0.25", examples, grpo.Config().seed))
    assert (
        sorted(map(str, parts[0] + parts[1])) == sorted(map(str, examples)) and len(examples) == 12
    )
    assert f"split     {tmp_path}/new/mine/heldout.jsonl: {len(parts[1])} rows" in lines
    kept = {path: path.read_bytes() for path in (tmp_path / "new/mine").iterdir()}
    message = refusal(check_data.main, [source, "--split", "0.5", str(tmp_path / "new/mine")])
    assert f"{tmp_path}/new/mine: exists already" in message and len(kept) == 3
    assert kept == {path: path.read_bytes() for path in (tmp_path / "new/mine").iterdir()}
    assert "0.01" in refusal(check_data.main, [source, "--split", "0.01", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_notes_that_do_not_concern_the_code(rows, write_rows, tmp_path, capsys):
    """Stops a contrast row whose note names something in the code, or that asks for a change, and
    a held-out code or note in training."""
    library = {"dependency": "Numpy", "new_version": "2.0", "description": ""}
    rows = []
    for i in range(40):
        code = f"import numpy as np\nprint(np.f{i % 20}(x{i}, key{i}=1).a{i})"
        texts = {"update_info": f"numpy.f{i % 20} has gone, key{i} stays", "old_code": code}
        rows.append(library | texts | {"new_code": code + ".T"})
    target = str(tmp_path / "mine")
    source = write_rows(rows)
    look(capsys, source, "--split", "0.25", target, "--contrast", "20")
    files = ("train", "heldout", "unrelated")
    train, heldout, unrelated = [data.load_examples(f"{target}/{name}.jsonl") for name in files]
    assert len(train) == 30 + 20 and len(heldout) == len(unrelated) == 10
    for made, source_rows in ((train[30:], train[:30]), (unrelated, heldout)):
        assert {e.old_code for e in made} <= {e.old_code for e in source_rows}
        assert {e.update_info for e in made} <= {e.update_info for e in source_rows}
        for e in made:
            assert e.new_code == e.old_code
            i = int(e.old_code.rpartition(".a")[2].rstrip(")"))
            assert not {f"f{i % 20}", f"key{i}"} & reward.words(e.update_info)
    other = target + "2"
    message = refusal(check_data.main, [source, "--split", "0.25", other, "--contrast", "99"])
    assert "--contrast 99" in message and not Path(other).exists()
    refusal(check_data.main, [source, "--contrast", "5"])


def test_names_of_the_library_itself_concern_no_note():
    """Stops "numpy" and "np" in a note from making every piece of code its subject."""
    code = "import numpy as np\nimport numpy.linalg as la\nla.norm(np.in1d(a, b=c))  # isin"
    assert tasks.answers.identifiers(code, "Numpy") == {"linalg", "norm", "in1d", "a", "b", "c"}
