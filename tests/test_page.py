"""page.html: what a run logs for it, and what a browser makes of it.

The browser is headless Chromium; without one in PATH its tests are skipped.
"""

import html
import html.parser
import json
import re
import shutil
import subprocess
import zlib

import pytest
import torch
from conftest import SCRIPTS, random_model
from test_run import metrics, read_page, small

import dora
import grpo
import reward
import rollout
import sft
from training import measure, page, run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROME = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--virtual-time-budget=5000", "--dump-dom",
)  # fmt: skip
needs_chrome = pytest.mark.skipif(not CHROME, reason="no chromium or google-chrome in PATH")
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!--<script>",
    "\u2028 & &lt; \\u003c DATA \"'`",
)
OLD = "import mathlib\nx = mathlib.twice(4)\ny = x"
NEW = "import mathlib\nx = mathlib.double(4)\ny = x"
NOTE = "twice was removed; use double."
CURVES = ("reward", "exact match", "stale", "obeys", "format", "length", "KL", "learning rate")


def answer(code):
    return f"\nwell\n</think>\n<answer>\n```python\n{code}\n```\n</answer>"


def sample(step, completion, reward, advantage, tokens, **more):
    """A row of samples.jsonl."""
    row = {"step": step, "update_info": NOTE, "completion": completion, "reward": reward}
    row |= {"format": 1.0, "parses": True, "es": 0.5, "em": 0.0, "stale": 0.0}
    row |= {"obeys": 0.0, "cut": False, "old_code": OLD, "new_code": NEW, "advantage": advantage}
    return row | {"tokens": tokens} | more


def write_run(path, samples, steps=(1, 2, 3)):
    """A run directory of these samples, with a row of metrics for every step."""
    path.mkdir(parents=True)
    rows = []
    for step in steps:
        row = {"step": step, "reward": 1.0, "em": 0.5, "stale": 0.25, "obeys": step / max(steps)}
        row |= {"format": 1.0, "completion_length": 40.0, "kl": 0.0, "lr": 1e-3, "loss": 0.0}
        rows.append(row)
    for name, part in (("metrics", rows), ("samples", samples)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return path


def opened(directory, runs, script):
    """What `script`, the body of a function, returns in a browser that shows the page of runs."""
    content = page.page(runs).decode()
    content += "<script type=module>document.body.append('\\u0002', "
    content += f"JSON.stringify((() => {{{script}}})()), '\\u0003')</script>"
    path = directory / "page.html"
    path.write_text(content)
    command = [CHROME, *FLAGS, f"--user-data-dir={directory}/chrome", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search("\u0002(.*)\u0003", done.stdout, re.DOTALL)
    assert found, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))


# ------------------------------------------------------------------------- what is logged


def test_log_probabilities_before_and_after_an_update(tokenizer):
    """Stops log-probabilities of another token or model, with dropout, or of a lost group."""
    model = random_model("qwen2", len(tokenizer))
    dora.add_dora(model, 4, 8.0, 0.5, "q_proj,up_proj")
    flat = rollout.Group([5, 6], None, [[8, 3], [8, 3]], ["a", "a"], advantages=[0.0, 0.0])
    group = rollout.Group([5, 6, 7], None, [[8, 9, 10, 3], [11, 3]], ["b", "c"])
    group.advantages = [1.0, -1.0]
    config = grpo.Config(output="none", show_every=10, micro_tokens=5)
    directory = run.RunDirectory(config, model, tokenizer)
    directory.watch(5, [flat, group])
    assert directory.group is None  # step 5 is not shown

    def expected():
        model.eval()
        for ids in group.completions:
            logits = model(torch.tensor([group.prompt + ids])).logits[0, 2:-1]
            yield logits.log_softmax(-1).gather(-1, torch.tensor([ids]).T)[:, 0].tolist()

    old = list(expected())
    directory.watch(10, [flat, group])
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.randn_like(p)
    torch.optim.SGD(parameters, lr=0.1).step()
    assert directory.group is group and group.advantages == [1.0, -1.0]
    found = [directory.logps, measure.token_logps(model, group, config)]
    for before, after, *right in zip(*found, old, expected(), strict=True):
        assert before == pytest.approx(right[0], abs=1e-3)
        assert after == pytest.approx(right[1], abs=1e-3)
        assert max(abs(x - y) for x, y in zip(before, after)) > 0.01


@pytest.fixture
def train(tmp_path, checkpoints, write_rows, rows):
    """train(name, *flags, script=grpo): a small run into tmp_path/name; its directory."""
    source = write_rows(rows)

    def start(name, *flags, script=grpo):
        fixed = ["--model", checkpoints["qwen2"], "--data", source, "--quiet", *small(script)]
        assert script.main([*fixed, "--output", str(tmp_path / name), *flags]) == 0
        return tmp_path / name

    return start


def score(grade, *rest):
    """A reward that differs between the completions of a random model."""
    return float(zlib.crc32(grade.completion.encode()) % 7)


def test_watching_changes_nothing(train, monkeypatch):
    """Stops the extra passes from drawing random numbers or leaving the model in another mode."""
    flags = ["--steps", "4", "--show-every", "3", "--dropout", "0.3", "--updates", "2"]
    monkeypatch.setattr(reward, "total", score)
    watched = train("watched", *flags)
    monkeypatch.setattr(run.RunDirectory, "watch", lambda *args: None)
    alone = train("alone", *flags)
    assert (alone / "samples.jsonl").read_text() == ""
    for row, other in zip(metrics(watched), metrics(alone), strict=True):
        assert all(row[name] == other[name] for name in row if "second" not in name)
    rows = [json.loads(line) for line in (watched / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 3, 3, 4, 4]
    for row in rows:
        text = "".join(token[0] for token in row["tokens"])
        text, whole = [re.sub(r"[^\x00-\x7f]", "", x) for x in (text, row["completion"])]
        assert text.startswith(whole) and abs(row["advantage"]) < 1  # half characters aside
        assert row["old_code"] and row["new_code"] and row["format"] == -1.0
    assert any(token[1] != token[2] for row in rows for token in row["tokens"])


def test_a_page_takes_a_hundredth_of_the_time(monkeypatch, tmp_path):
    """Stops a page whose cost grows with the run from being written at every step."""
    now = [0.0]
    writes = []

    def write(path, content):
        writes.append(path)
        now[0] += 0.1 * len(writes)  # each one is slower than the last

    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run, "write", write)
    directory = run.RunDirectory(grpo.Config(output=str(tmp_path / "new")), None, None)
    for _ in range(3000):
        now[0] += 1.0
        directory.write_page()
    spent = sum(0.1 * (i + 1) for i in range(len(writes)))
    assert len(writes) > 10 and spent < 0.01 * now[0] + 0.1 * len(writes)
    directory.write_page(last=True)
    assert writes[-1] == tmp_path / "new/page.html"


# ------------------------------------------------------------------------- what is in the file


@pytest.mark.slow
def test_a_long_run_has_a_small_page(tmp_path):
    """Stops a page that a browser cannot open, and one that loses the first or last step."""
    tokens = [["name_of ", -1.2345, -1.2044]] * 70
    group = [sample(0, answer(OLD), 1.0, 0.5, tokens) for _ in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in group)
    path = write_run(tmp_path / "run", [], range(1, 5001))
    steps = range(10, 5001, 10)
    content = "".join(text.replace('"step": 0,', f'"step": {step},') for step in steps)
    (path / "samples.jsonl").write_text(content)
    made = page.page([path])
    assert len(made) < 3_000_000
    (tmp_path / "page.html").write_bytes(made)
    [shown] = read_page(tmp_path / "page.html")
    assert len(shown["curves"]) == 5000 and shown["logged"] == 500
    found = [task["answers"][0]["step"] for task in shown["steps"]]
    assert found[0] == 10 and found[-1] == 5000 and len(found) > 30
    assert len(page.page([path, path])) < 3_000_000


def test_no_text_becomes_markup(tmp_path):
    """Stops texts of models, data and paths from ending the script element that holds them."""
    rows = []
    for step, text in enumerate(HOSTILE, 1):
        more = {"update_info": text, "old_code": text, "new_code": f"{text} = 1"}
        rows.append(sample(step, text, 1.0, 0.5, [[text, -1.0, -0.5]], **more))
        rows.append(sample(step, answer(text), 0.5, -0.5, [], **more))
    path = write_run(tmp_path / "a<img src=x>'\"", rows)
    made = page.page([path]).decode()
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(made)
    assert tags.count("script") == 2 and "img" not in tags
    assert not re.search(r"src=|href=|url\(|@import|fetch\(", page.TEMPLATE)  # nothing is loaded
    (tmp_path / "page.html").write_text(made)
    [shown] = read_page(tmp_path / "page.html")
    assert shown["name"] == str(path)
    assert [task["answers"][0]["tokens"][0][0] for task in shown["steps"]] == list(HOSTILE)


# ------------------------------------------------------------------------- in a browser

READ = """
    const text = (selector, root = document) =>
      [...root.querySelectorAll(selector)].map((node) => node.textContent);
    const state = () => ({
      where: text("output"), rewards: text("big"), likely: text("strong"),
      classes: [...document.querySelectorAll("article")].map((node) => node.classList[2]),
      bars: [...document.querySelectorAll(".bar")].map((bar) => {
        const [all, one] = [bar, bar.firstChild].map((node) => node.getBoundingClientRect());
        return [(one.left - all.left) / all.width, (one.right - all.left) / all.width];
      }),
      why: [...document.querySelectorAll("article")].map((node) => text("small", node)),
      tints: [...document.querySelectorAll("pre span")].map((node) =>
        [node.textContent, node.className, parseFloat(node.style.getPropertyValue("--much"))]),
      gone: text("del"), added: text("ins"), marked: text("mark"), heads: text("h3"),
      wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      images: document.querySelectorAll("img").length, hacked: "hacked" in window,
      body: document.body.innerText,
    });
    const slider = document.querySelector("input");
    const move = (to) => { slider.value = to; slider.dispatchEvent(new Event("input")); };
    const press = (key) => document.body.dispatchEvent(
      new KeyboardEvent("keydown", { key, bubbles: true }));
"""


@needs_chrome
def test_a_step_in_a_browser(tmp_path):
    """Stops a slider that shows another step, a bar to the wrong side, an unmarked change."""
    best = [["double", -1.5, -1.0], ["(4)", -0.1, -0.1], ["!", -1.0, -1.125]]
    worst = [["twice\n", -0.5, -0.75]]
    exact = {"em": 1.0, "obeys": 1.0}
    rows = [sample(1, answer(OLD), 2.0, 0.0, [["a", -1.0, -1.0]])]
    rows.append(sample(2, answer(OLD), 2.5, 0.5, [], stale=1.0))
    rows.append(sample(2, "\nx = (", -3.0, -2.0, worst, format=-1.0, parses=False, cut=True))
    rows.append(sample(2, answer(NEW), 3.0, 1.0, best, **exact))
    rows += [sample(3, answer(OLD), 1.0, 0.0, [])] * 4
    path = write_run(tmp_path / "run", rows)
    script = "const first = state(); move(1); const second = state(); press('ArrowRight');"
    script += "const third = state(); press('ArrowLeft'); return [first, second, third, state()];"
    first, second, third, back = opened(tmp_path, [path], READ + script)
    places = [["step 1"], ["step 2"], ["step 3"]]
    assert [each["where"] for each in (first, second, third)] == places
    assert second == back and not second["wide"] > 0
    assert second["rewards"] == ["3", "2.5", "\u22123"]
    assert second["classes"] == ["more", "more", "less"]
    assert second["likely"] == ["more likely", "more likely", "less likely"]
    bars = [[0.5, 0.75], [0.5, 0.625], [0, 0.5]]
    assert [x for bar in second["bars"] for x in bar] == pytest.approx(sum(bars, []), abs=0.02)
    right, copy, broken = second["why"]
    assert right[:3] == ["format +1.00, well-formed", "code +2.00, exact", "uses the note's names"]
    assert right[3] == "log-probability -2.60, then -2.23"
    assert copy[1:] == ["code +1.50, a copy of the old code", "lacks double"]
    assert broken[:3] == ["format -1.00, cut at the limit", "code -2.00, no code", "lacks double"]
    up, same, down, last = second["tints"]
    assert up == ["double", "more", 45.0] and same[2] == 0 and 15 < down[2] < last[2] < up[2]
    assert (down[1], last[:2]) == ("less", ["twice\u21b5\n", "less"])
    assert second["gone"] == ["twice", "twice"] and second["added"] == ["double", "double"]
    assert second["marked"] == ["double"] * 3  # in the note, the reference, the right answer
    obeys = ["obeys0.333", "obeys0.667", "obeys1"]
    assert [each["heads"][3] for each in (first, second, third)] == obeys
    heads = [name for name in CURVES if name != "KL"]  # 0 in this run
    assert all(head.startswith(name) for head, name in zip(first["heads"], heads))
    assert first["likely"] == ["no push"] and third["rewards"] == ["1"]
    assert "reward, 4 times" in third["body"] and "times" not in second["body"]


@needs_chrome
def test_hostile_texts_in_a_browser(tmp_path):
    """Stops a text that a model wrote from being run, and from being shown as something else."""
    rows = []
    for step, text in enumerate(HOSTILE, 1):
        more = {"update_info": text, "old_code": text, "new_code": text}
        rows.append(sample(step, answer(text), 1.0, 0.5, [[text, -1.0, -0.5]], **more))
        rows.append(sample(step, text, 0.5, -0.5, [], **more))
    path = write_run(tmp_path / "<img src=x onerror='window.hacked = 1'>", rows)
    script = "return [0, 1, 2, 3].map((i) => { move(i); return state(); });"
    for text, state in zip(HOSTILE, opened(tmp_path, [path], READ + script), strict=True):
        assert not state["hacked"] and state["images"] == 0
        assert state["body"].count(text.replace("\u2028", "")) >= 5 or "\u2028" in text
        assert str(path) in state["body"]


@needs_chrome
def test_an_older_run_in_a_browser(tmp_path):
    """Stops a run from before a page existed from having none."""
    rows = []
    for step in (0, 1, 3):
        row = {"step": step, "update_info": NOTE, "completion": answer(NEW), "reward": 3.0}
        rows.append(row | ({} if step == 1 else {"heldout": True}))
    path = write_run(tmp_path / "run", rows)
    before = {"em": 0.125, "stale": 0.75, "format": 1.0, "es": 0.5, "reward": 1.5}
    table = {"before": before, "after": before | {"em": 0.875}}
    (path / "heldout.json").write_text(json.dumps(table))
    state = opened(tmp_path, [path], READ + "return state();")
    assert state["where"] == ["step 1"] and state["rewards"] == ["3"]
    assert "mathlib.double(4)" in state["body"] and NOTE in state["body"]
    assert "+0.750" in state["body"] and "reward at step 1" in state["body"]


@needs_chrome
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_real_run_in_a_browser(script, train, tmp_path):
    """Stops a page that fails on what the scripts really log, and a lost held-out table."""
    path = train("run", "--steps", "2", "--heldout", "0.4", "--show-every", "1", script=script)
    shown = (path / "page.html").read_bytes()
    assert shown == page.page([path])  # written at the end
    state = opened(tmp_path, [path], READ + "if (slider) move(1); return state();")
    assert state["where"] == (["step 2"] if script is not sft else [])
    assert "exact match" in state["body"] and "learning rate" in state["body"]
    assert ("loss" in state["body"]) == (script is sft) and not state["wide"] > 0
    assert bool(state["tints"]) == (script is not sft)


@needs_chrome
def test_several_runs_in_a_browser(train, tmp_path):
    """Stops a page of several runs that shows the steps of one of them only."""
    runs = [write_run(tmp_path / name, [sample(2, answer(OLD), 1.0, 0.5, [])]) for name in "ab"]
    script = "const one = state(); move(1); return [one, state()];"
    one, two = opened(tmp_path, runs, READ + script)
    assert one["where"] == [f"{runs[0]}, step 2"] and two["where"] == [f"{runs[1]}, step 2"]
    assert one["heads"][0] == "reward11"  # a value of each
