"""The HTML page: well formed, complete, self-contained; every finding is on it once; any text may be in names and reasons."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny

from memrewrite.cli.page import page
from memrewrite.cli.page_html import count, short, tag, with_code
from memrewrite.module_node import ModuleNode
from memrewrite.passes import pipeline
from memrewrite.passes.plan.select import select
from memrewrite.plans import Plan
from memrewrite.recipes.reader import read_recipe
from memrewrite.site import Binding, Inspection, NearMiss, Site

VOID = {"meta", "wbr"}
HOSTILE = "</style><script>alert('x')</script>&amp;\"'<!--\x00\x1b[2J\ud800`"


class Parsed(HTMLParser):
    """Elements with attributes and texts, and a list of everything that is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if len(dict(attrs)) != len(attrs):
            self.wrong.append(f"{tag} has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, attribute: str) -> list[str]:
        """The values of an attribute, in order."""
        return [str(attrs[attribute]) for _, attrs in self.elements if attribute in attrs]

    def of_class(self, name: str) -> int:
        """How many elements have a class."""
        return sum(name in (attrs.get("class") or "").split() for _, attrs in self.elements)


@cache
def surveyed(name: str, recipe: str | None = None) -> tuple[Inspection, ModuleNode, Plan | None]:
    model, inputs = tiny.named(name)
    return pipeline.survey(model, inputs, tiny.recipe(recipe) if recipe else None)


def parsed_page(located: Inspection, root: ModuleNode, plan: Plan | None = None, name: str = "model.py") -> Parsed:
    text = page(name, root, located, plan)
    text.encode("utf-8")
    assert text.startswith("<!doctype html>\n")
    parsed = Parsed(text.removeprefix("<!doctype html>\n"))
    assert not parsed.wrong
    assert not re.search(r"https?:|//|@import|url\(|<script|\son\w+=", re.sub(r"&[#\w]+;", "", text.replace(HOSTILE, "")))
    assert not {"src", "srcset", "style", "onload", "action"} & {a for _, attrs in parsed.elements for a in attrs}
    ids, links = parsed.all("id"), parsed.all("href")
    assert len(ids) == len(set(ids))
    assert {link for link in links if link.removeprefix("#") not in ids} == set()
    assert Counter(parsed.all("data-site")) == Counter(site.path for site in located.sites)
    assert Counter(parsed.all("data-miss")) == Counter(miss.path for miss in located.near_misses)
    return parsed


# ------------------------------------------------------------------------------------------ inspections without a model


def site(path: str, tower: str = "", block: int | None = None, blocks: int = 0, **changes: Any) -> Site:
    fields: dict[str, Any] = {
        "path": path, "pattern": "plain", "d_model": 8, "d_in": 8, "d_hidden": 32, "activation": "gelu", "calls": 1,
        "parameters": (f"{path}.up.weight",), "modules": (path,), "weights": 512, "active": 512, "biases": 0,
        "dtype": "float32", "device": "cpu", "tower": tower, "block": block, "tower_blocks": blocks,
        "bindings": (Binding(kind="module", entries=(path,), exit=path),),
    }  # fmt: skip
    return Site(**{**fields, **changes})


def part(path: str, *children: ModuleNode, kind: str = "Thing", parameters: int = 512) -> ModuleNode:
    return ModuleNode(path=path, kind=kind, parameters=parameters, children=children)


def deep(depth: int, towers: tuple[str, ...] = ("blocks",)) -> tuple[Inspection, ModuleNode]:
    """A model with towers of blocks, each block with an MLP."""
    stacks = []
    for tower in towers:
        blocks = [part(f"{tower}.{i}", part(f"{tower}.{i}.mlp"), kind="Block") for i in range(depth)]
        stacks.append(part(tower, *blocks, kind="ModuleList"))
    sites = [site(f"{tower}.{i}.mlp", tower, i, depth) for tower in towers for i in range(depth)]
    return Inspection(sites=tuple(sites), near_misses=(), captured="as given"), part("", *stacks)


def missing(path: str, reason: str = "its inner value `gelu_3` is also read outside, by `add`") -> NearMiss:
    return NearMiss(path=path, reason=reason, node="gelu_3", source=f"{__file__}:1")


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize(("name", "towers"), [("modular", 1), ("bert", 1), ("t5", 2), ("albert", 1), ("shared", 1)])
def test_models(name: str, towers: int) -> None:
    located, root, _ = surveyed(name)
    parsed = parsed_page(located, root)
    assert len(parsed.all("data-tower")) == towers
    assert located.captured in "".join(parsed.texts)
    assert parsed.of_class("layer") == 0


@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_a_plan_is_shown_at_the_sites_and_at_the_pools(placement: str) -> None:
    located, root, plan = surveyed("modular", placement)
    assert plan is not None
    parsed = parsed_page(located, root, plan)
    assert parsed.of_class("layer") == len(plan.substitutions) == parsed.all("href").count("#pool-0")
    assert parsed.all("id").count("pool-0") == 1
    assert len([d for d in parsed.all("d") if d.startswith("M0,")]) == len(plan.substitutions)
    text = "".join(parsed.texts)
    assert "read by 3 layers" in text
    assert {"replace": "replaces the MLP", "parallel": "in parallel with the MLP"}[placement] in text


def test_modules_are_shown_in_the_order_in_which_they_ran() -> None:
    """Registration order may differ: a class may register its norms last."""
    located, root, _ = surveyed("llama")
    block = next(child for child in root.children[0].children if child.path == "model.layers").children[0]
    names = [child.path.rpartition(".")[2] for child in block.children]
    assert names == ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"]
    assert parsed_page(located, root)


def test_many_layers_of_one_pool_share_a_line() -> None:
    located, root = deep(40)
    plan = select(located, read_recipe(tiny.recipe()))
    parsed = parsed_page(located, root, plan)
    assert parsed.of_class("layer") == 40
    assert len([d for d in parsed.all("d") if d.startswith("M0,")]) == 1


# ----------------------------------------------------------------------------------------------------------- folding


def test_equal_blocks_are_folded() -> None:
    located, root = deep(126)
    parsed = parsed_page(located, root)
    assert parsed.all("data-similar") == ["125"]
    assert "blocks 1–125" in parsed.texts


def test_blocks_that_differ_are_not_folded_together() -> None:
    located, root = deep(12)
    odd = [missing("blocks.4.mlp"), missing("blocks.9.mlp")]
    sites = tuple(s for s in located.sites if s.block not in (4, 9))
    parsed = parsed_page(located.model_copy(update={"sites": sites, "near_misses": tuple(odd)}), root)
    assert parsed.all("data-similar") == ["3", "4", "1", "2"]  # 1-3, 5-8, 9 (equal to 4), 10-11; not folded: 0 and 4
    assert "line used" not in [attrs.get("class") for _, attrs in parsed.elements]


def test_blocks_that_alternate_are_folded_into_one() -> None:
    located, root = deep(40)
    every_other = read_recipe(tiny.recipe(where={"every": 2}))
    parsed = parsed_page(located, root, select(located, every_other))
    assert parsed.all("data-similar") == ["38"]
    assert "each like block 0 or 1" in parsed.texts


def test_towers_are_shown_in_columns() -> None:
    parsed = parsed_page(*deep(3, ("one", "two", "three")))
    assert parsed.all("data-tower") == ["one", "two", "three"]
    assert parsed.of_class("columns") == 1
    assert parsed.of_class("column") == 3


# -------------------------------------------------------------------------------------------------------------- edges


def test_a_model_that_is_one_mlp_or_nothing() -> None:
    alone = Inspection(sites=(site("", modules=("",)),), near_misses=(), captured="as given")
    assert parsed_page(alone, part("", part("up"), part("down")))
    nothing = parsed_page(Inspection(sites=(), near_misses=(), captured="as given"), part("", parameters=0))
    assert "Nothing in this model looks like an MLP." in nothing.texts


def test_marks_at_missing_modules_and_several_marks_at_one_module() -> None:
    """A traced model may no longer have its modules; two MLPs may be in one module."""
    located, root = deep(2)
    more = (site("blocks.0.mlp#linear_7"), site("gone.far.away"))
    near = (missing("blocks.1.mlp.act"), missing("blocks.1.mlp.act"), missing(""))
    assert parsed_page(located.model_copy(update={"sites": (*located.sites, *more), "near_misses": near}), root)


def test_numbered_modules_that_are_no_tower() -> None:
    """A small head of numbered layers."""
    located, root = deep(2)
    root = root.model_copy(update={"children": (*root.children, part("head", part("head.0"), part("head.1", kind="Other")))})
    assert parsed_page(located, root).all("data-tower") == ["blocks"]


def test_hostile_names() -> None:
    path = f"blocks.0.{HOSTILE}"
    block = part("blocks.0", part(path, kind=HOSTILE), kind=HOSTILE)
    root = part("", part("blocks", block, part("blocks.1")), kind=HOSTILE)
    bad = site(path, "blocks", 0, 2, activation=HOSTILE, pattern=HOSTILE, parameters=(HOSTILE,))
    misses = (NearMiss(path="blocks.1", reason=f"`{HOSTILE}", node=HOSTILE, source=HOSTILE),)
    text = page(HOSTILE, root, Inspection(sites=(bad,), near_misses=misses, captured=HOSTILE))
    parsed = Parsed(text.removeprefix("<!doctype html>\n"))
    assert not parsed.wrong
    assert "script" not in {name for name, _ in parsed.elements}
    assert not {"\x00", "\x1b", "\ud800"} & set(text)
    (shown,) = parsed.all("data-site")
    assert "</style><script>alert('x')</script>&amp;" in shown


def test_markup() -> None:
    assert (
        tag("p", "<", None, tag("b", "&"), title='"', hidden=True, id=None) == '<p title="&quot;" hidden>&lt;<b>&amp;</b></p>'
    )
    assert with_code("a `b` c") == "a <code>b</code> c"
    assert with_code("a `b") == "a `b"
    numbers = (999, 9_999, 12_345, 999_999, 1_234_567, 134_515_008, 70 * 10**9)
    assert [short(n) for n in numbers] == ["999", "9,999", "12.3 k", "1.00 M", "1.23 M", "135 M", "70.0 B"]
    assert (count(1, "block"), count(2, "near miss", "near misses")) == ("1 block", "2 near misses")


# ------------------------------------------------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def browse(file: Path, profile: Path) -> tuple[str, list[str]]:
    """The DOM in a browser, and its console messages: errors, and requests that the page's policy forbids."""
    assert CHROMIUM is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [CHROMIUM, *quiet, f"--user-data-dir={profile}", "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser(tmp_path: Path) -> None:
    located, root, plan = surveyed("modular", "parallel")
    text = page("model.py", root, located, plan)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    dom, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert console == []
    assert Counter(Parsed(dom.partition(">")[2]).all("data-site")) == Counter(site.path for site in located.sites)
    loud = text.replace("</main>", '<img src="http://localhost:9/x.png"></main>')  # a violation must be reported
    (tmp_path / "loud.html").write_text(loud, encoding="utf-8")
    assert browse(tmp_path / "loud.html", tmp_path / "profile")[1]
