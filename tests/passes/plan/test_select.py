"""Selection: every selector, alone and combined; every way in which a recipe can fail to match a model; the plan as data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from memrewrite.errors import SelectError
from memrewrite.passes.plan import memory_budget
from memrewrite.passes.plan.select import narrowed, select
from memrewrite.passes.plan.selectors import centred
from memrewrite.plans import Plan
from memrewrite.recipes.gallery_index import gallery
from memrewrite.recipes.schema import Recipe
from memrewrite.site import Binding, Inspection, NearMiss, Site

SMALL = {"heads": 2, "topk": 4}
TABLE = 16 * 16 * 64 * 4  # bytes of 16 × 16 slots of 64 floats
LAYER = 4 * (64 * 64 + 64 + 2 * 2 * 16 * 16 + 2 * 16 + 2 * (64 * 64 + 64))  # query, half keys, two norms, gate, projection


def site(number: int | None, tower: str = "layers", depth: int = 24, **changes: Any) -> Site:
    """A gated MLP of width 64 in block `number` of `tower`."""
    path = "mlp" if number is None else f"{tower.replace('*', '0')}.{number}.mlp"
    path = changes.setdefault("path", path)
    given: dict[str, Any] = {
        "pattern": "gated",
        "d_model": 64,
        "d_in": 64,
        "d_hidden": 96,
        "activation": "silu",
        "calls": 1,
        "parameters": (f"{path}.up", f"{path}.down"),
        "modules": (path,),
        "weights": 3 * 64 * 96,
        "active": 3 * 64 * 96,
        "biases": 0,
        "dtype": "float32",
        "device": "cpu",
        "tower": "" if number is None else tower,
        "block": number,
        "tower_blocks": 0 if number is None else depth,
        "bindings": (Binding(kind="module", entries=(path,), exit=path),),
    }
    return Site.model_validate(given | changes)


def located(*sites: Site, misses: tuple[NearMiss, ...] = ()) -> Inspection:
    return Inspection(sites=sites, near_misses=misses, captured="whole model")


def recipe(*wheres: dict[str, Any], pool: dict[str, Any] | None = None, **options: Any) -> Recipe:
    """One rule for each `where`, all on one pool."""
    rules = [{"where": w, "with": "memory_plus", "pool": "shared", "options": {**SMALL, **options}} for w in wheres]
    return Recipe.model_validate({"memrewrite": 1, "pools": {"shared": {"keys": 16, **(pool or {})}}, "replace": rules})


def chosen(found: Inspection, **where: Any) -> list[str]:
    return [substitution.site.path for substitution in select(found, recipe(where)).substitutions]


def blocks(found: Inspection, **where: Any) -> list[int | None]:
    return [substitution.site.block for substitution in select(found, recipe(where)).substitutions]


def refused(found: Inspection, wanted: Recipe, **options: Any) -> SelectError:
    """The error, which has all three parts."""
    with pytest.raises(SelectError) as caught:
        select(found, wanted, **options)
    error = caught.value
    assert error.what
    assert error.where
    assert error.hint
    assert error.exit_code == 2
    return error


DEEP = located(*(site(i) for i in range(24)))
MIXED = located(  # two towers of different width, and an MLP outside of both
    *(site(i, "vision.blocks", 2, d_model=32, d_in=32, pattern="plain") for i in range(2)),
    *(site(i, "text.layers", 6) for i in range(6)),
    site(None, path="joint", pattern="plain"),
)


# ------------------------------------------------------------------------------------------------------- one selector


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ({"layers": [4, 12, 20]}, [4, 12, 20]),
        ({"layers": [20, 4]}, [4, 20]),  # sites come in the order they run
        ({"layers": [0]}, [0]),
        ({"layers": [23]}, [23]),
        ({"centred": {"count": 3, "stride": 8}}, [4, 12, 20]),  # the paper's layout
        ({"centred": {"count": 1}}, [12]),
        ({"centred": {"count": 3}}, [11, 12, 13]),
        ({"centred": {"count": 2, "stride": 8}}, [8, 16]),
        ({"every": 4}, [3, 7, 11, 15, 19, 23]),
        ({"every": 24}, [23]),
        ({"every": 1}, list(range(24))),
        ({"path": "layers.1?.mlp"}, list(range(10, 20))),
        ({"path": "*.7.mlp"}, [7]),
        ({"regex": r"\.(3|5)\."}, [3, 5]),
        ({"regex": "^layers.2[0-9]"}, [20, 21, 22, 23]),
        ({"pattern": "gated"}, list(range(24))),
        ({"d_model": 64}, list(range(24))),
        ({"all": True}, list(range(24))),
        ({"tower": "layers"}, list(range(24))),
    ],
)
def test_a_selector_alone(where: dict[str, Any], wanted: list[int]) -> None:
    assert blocks(DEEP, **where) == wanted


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ({"all": True}, [*(s.path for s in MIXED.sites)]),
        ({"layers": [0]}, ["text.layers.0.mlp"]),  # of the tower with most MLPs
        ({"layers": [0], "tower": "vision.blocks"}, ["vision.blocks.0.mlp"]),
        ({"tower": "vision.blocks"}, ["vision.blocks.0.mlp", "vision.blocks.1.mlp"]),
        ({"every": 3}, ["text.layers.2.mlp", "text.layers.5.mlp"]),
        ({"centred": {"count": 1}}, ["text.layers.3.mlp"]),
        ({"pattern": "plain"}, ["vision.blocks.0.mlp", "vision.blocks.1.mlp", "joint"]),
        ({"d_model": 32}, ["vision.blocks.0.mlp", "vision.blocks.1.mlp"]),
        ({"path": "joint"}, ["joint"]),
    ],
)
def test_a_selector_among_towers(where: dict[str, Any], wanted: list[str]) -> None:
    assert [s.site.path for s in select(MIXED, recipe(where, pool={"value_dim": 8})).substitutions] == wanted


# --------------------------------------------------------------------------------------------------------- and together


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ({"layers": [3, 7], "every": 4}, [3, 7]),
        ({"every": 2, "regex": r"\.1\d\."}, [11, 13, 15, 17, 19]),
        ({"all": True, "path": "layers.2.*"}, [2]),
        ({"centred": {"count": 3, "stride": 8}, "pattern": "gated", "d_model": 64, "tower": "layers"}, [4, 12, 20]),
        ({"path": "layers.1*", "regex": "1.mlp$"}, [1, 11]),
    ],
)
def test_selectors_combine_with_and(where: dict[str, Any], wanted: list[int]) -> None:
    assert blocks(DEEP, **where) == wanted


def test_all_mlps_of_a_block_are_taken() -> None:
    found = located(*(site(i, path=f"layers.{i}.{half}", depth=4) for i in range(4) for half in ("ffn1", "ffn2")))
    assert chosen(found, layers=[1]) == ["layers.1.ffn1", "layers.1.ffn2"]
    assert chosen(found, layers=[1], path="*.ffn2") == ["layers.1.ffn2"]


def test_rules_divide_the_sites_between_them() -> None:
    rules = recipe({"layers": [0]}, {"layers": [1, 2]}).to_data()
    rules["replace"][1] |= {"placement": "parallel", "options": {**SMALL, "heads": 1}}
    made = select(DEEP, Recipe.model_validate(rules))
    assert [(s.site.block, s.placement, s.options["heads"]) for s in made.substitutions] == [
        (0, "replace", 2),
        (1, "parallel", 1),
        (2, "parallel", 1),
    ]


@pytest.mark.parametrize(
    ("depth", "count", "stride", "wanted"),
    [
        (24, 3, 8, [4, 12, 20]),
        (22, 3, 8, [3, 11, 19]),
        (30, 3, 8, [7, 15, 23]),
        (17, 3, 8, [0, 8, 16]),
        (1, 1, 1, [0]),
        (2, 2, 1, [0, 1]),
        (6, 1, 5, [3]),
    ],
)
def test_centred(depth: int, count: int, stride: int, wanted: list[int]) -> None:
    assert centred(depth, count, stride) == wanted


@pytest.mark.parametrize("depth", range(1, 40))
def test_centred_fits_or_names_the_largest_stride_that_fits(depth: int) -> None:
    """The stride that the hint names fits, and the next one does not."""
    for count in range(1, depth + 1):
        try:
            placed = centred(depth, count, 8)
        except SelectError as error:
            largest = int(str(error.hint).removeprefix("a stride of at most ").split(",")[0])
            placed = centred(depth, count, largest)
            with pytest.raises(SelectError):
                centred(depth, count, largest + 1)
        assert len(placed) == count
        assert 0 <= placed[0] <= placed[-1] < depth


def test_centred_with_more_blocks_than_there_are() -> None:
    with pytest.raises(SelectError, match="3 blocks 1 apart do not fit around the middle of 2 blocks") as caught:
        centred(2, 3, 1)
    assert caught.value.hint == "fewer blocks, or name the blocks: `layers: [...]`"


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_model_without_mlps() -> None:
    miss = NearMiss(path="head", reason="nothing is added", node="linear_3")
    error = refused(located(misses=(miss,)), recipe({"all": True}))
    assert error.what == "no MLP was found in this model (1 near misses: head: nothing is added)"
    assert error.where == "whole model"


@pytest.mark.parametrize("count", [3, 4])
def test_the_first_three_near_misses_are_listed(count: int) -> None:
    misses = tuple(NearMiss(path=f"head{i}", reason="nothing is added", node=f"linear_{i}") for i in range(count))
    error = refused(located(misses=misses), recipe({"all": True}))
    listed = "; ".join(f"head{i}: nothing is added" for i in range(3))
    assert error.what == f"no MLP was found in this model ({count} near misses: {listed})"


@pytest.mark.parametrize(("count", "more"), [(1, ""), (6, ""), (7, ", ...")])
def test_a_hint_lists_at_most_six_values(count: int, more: str) -> None:
    """Values that occur twice are listed once."""
    found = located(*(site(i, d_model=100 + i // 2, d_in=100 + i // 2, depth=2 * count) for i in range(2 * count)))
    error = refused(found, recipe({"d_model": 7}))
    assert error.hint == f"there are: {', '.join(str(100 + i) for i in range(min(count, 6)))}{more}"


@pytest.mark.parametrize(
    ("where", "what", "hint"),
    [
        ({"path": "layers.*.mpl"}, "`path: layers.*.mpl` matches none of 24 MLPs", "did you mean 'layers."),
        ({"path": "layers.3.mpl"}, "matches none of 24 MLPs", "did you mean 'layers.3.mlp'"),
        ({"regex": "^mlp$"}, "`regex: ^mlp$`", "there are: layers.0.mlp, layers.1.mlp"),
        ({"pattern": "gate"}, "`pattern: gate`", "did you mean 'gated'"),
        ({"d_model": 63}, "`d_model: 63`", "there are: 64"),
        ({"tower": "layer"}, "no MLP is in a tower 'layer'", "there are: layers"),
        ({"layers": [3, 24]}, "there is no block 24", "'layers' has blocks 0 to 23"),
        ({"every": 25}, "match no MLP", "drop one"),
        ({"layers": [1], "every": 4}, "block 1 of 'layers' has no MLP that fits", "blocks with one: 0-23"),
        ({"layers": [1, 2], "path": "*.1.*"}, "block 2 of 'layers' has no MLP that fits", "blocks with one"),
        ({"path": "*.1.*", "regex": "2"}, "`regex: 2` matches none of 1 MLPs", "there are: layers.1.mlp"),
        ({"centred": {"count": 3, "stride": 12}}, "3 blocks 12 apart do not fit", "a stride of at most 11"),
        ({"centred": {"count": 25}}, "25 blocks 1 apart do not fit", "layers: [...]"),
    ],
)
def test_a_selector_that_matches_nothing(where: dict[str, Any], what: str, hint: str) -> None:
    error = refused(DEEP, recipe(where))
    assert what in error.what
    assert hint in str(error.hint)
    assert str(error.where).startswith("replace[0].where")


def test_the_rule_is_named_by_its_number() -> None:
    error = refused(DEEP, recipe({"layers": [0]}, {"pattern": "moe"}))
    assert error.where == "replace[1].where"


def test_two_rules_for_one_site() -> None:
    error = refused(DEEP, recipe({"layers": [3]}, {"every": 4}))
    assert error.what == "rules 0 and 1 both select 'layers.3.mlp'"
    assert error.where == "replace[1].where"
    assert "narrow" in str(error.hint)


def test_a_block_without_an_mlp() -> None:
    found = located(*(site(i, depth=8) for i in (0, 1, 2, 5, 7)))
    error = refused(found, recipe({"layers": [6, 2, 3, 4]}))
    assert error.what == "block 3 of 'layers' has no MLP that fits"
    assert error.hint == "blocks with one: 0-2, 5, 7"


@pytest.mark.parametrize(
    ("free", "fits"), [(2 * (TABLE + LAYER) - 1, False), (2 * (TABLE + LAYER), True), (None, True)], ids=str
)
def test_pools_must_fit_into_thefree_memory_of_their_device(
    free: int | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pools of 16 × 16 slots of 64 floats and two layers: exactly their size is enough; an unknown size is not tested."""
    wanted = recipe({"layers": [0]}, {"layers": [1]}).to_data()
    wanted["pools"]["other"] = dict(wanted["pools"]["shared"])
    wanted["replace"][1]["pool"] = "other"
    made = select(DEEP, Recipe.model_validate(wanted))
    monkeypatch.setattr(memory_budget, "free_memory", lambda device: free if device == torch.device("cpu") else 1 / 0)
    if fits:
        memory_budget.refuse_too_large(made)
    else:
        with pytest.raises(SelectError, match=r"shared: 256 × 64 float32, other: 256 × 64 float32.*and cpu has") as caught:
            memory_budget.refuse_too_large(made)
        assert caught.value.where == "pools.shared"


def testfree_memory_is_what_the_system_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       4000 kB\nMemAvailable:   3000 kB\n")
    monkeypatch.setattr(memory_budget, "MEMINFO", meminfo)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    free = [memory_budget.free_memory(torch.device(name)) for name in ("cpu", "cuda:0", "meta")]
    assert free == [3000 * 1024, 123, None]
    meminfo.unlink()
    assert memory_budget.free_memory(torch.device("cpu")) is None


@pytest.mark.parametrize("where", [{"layers": [0]}, {"centred": {"count": 1}}, {"every": 1}])
def test_a_model_without_a_stack(where: dict[str, Any]) -> None:
    error = refused(located(site(None)), recipe(where))
    assert "no stack of blocks" in error.what
    assert "all: true" in str(error.hint)


def test_one_pool_for_sites_of_two_widths() -> None:
    error = refused(MIXED, recipe({"all": True}))
    assert error.what == "the sites that share pool 'shared' have different d_model: [32, 64]"
    assert error.where == "pools.shared"
    assert "value_dim" in str(error.hint)


def test_one_pool_for_sites_of_two_dtypes() -> None:
    found = located(site(0), site(1, dtype="bfloat16"))
    error = refused(found, recipe({"all": True}))
    assert error.what.endswith("have different dtypes: ['bfloat16', 'float32']")
    assert select(found, recipe({"all": True}, pool={"dtype": "float32"})).pools["shared"].dtype == "float32"


def unread(pool: dict[str, Any], **options: Any) -> Recipe:
    """A recipe that no file can contain, because the parser refuses it earlier: `select` has to refuse it too."""
    wanted = recipe({"all": True}, pool=pool)
    rule = wanted.replace[0].model_copy(update={"options": {**SMALL, **options}})
    return wanted.model_copy(update={"replace": (rule,)})


@pytest.mark.parametrize(("pool", "options", "word"), [({}, {"key_dim": 33}, "key_dim"), ({"keys": 4}, {"topk": 16}, "topk")])
def test_options_that_cannot_be_built(pool: dict[str, Any], options: dict[str, Any], word: str) -> None:
    error = refused(DEEP, unread(pool, **options))
    assert word in error.what
    assert error.where == "replace[0] at 'layers.0.mlp'"


@pytest.mark.parametrize("width", [63, 64, 65, 66, 576])
def test_any_width_can_be_served(width: int) -> None:
    made = select(located(site(0, d_model=width, d_in=width)), recipe({"all": True}))
    assert made.pools["shared"].value_dim == width


def test_a_site_that_the_module_tree_cannot_express() -> None:
    found = located(site(0), site(1, bindings=(Binding(kind="none", why="its weights have no module", advice="give it one"),)))
    error = refused(found, recipe({"all": True}))
    assert error.what == "the MLP at 'layers.1.mlp' cannot be edited in the module tree: its weights have no module"
    assert error.hint == "give it one"
    assert len(select(found, recipe({"all": True}), live=False).substitutions) == 2  # a graph can
    assert len(select(found, recipe({"layers": [0]})).substitutions) == 1  # without the site that is not reachable


def test_a_site_of_which_one_call_is_out_of_reach() -> None:
    half = (Binding(kind="module", entries=("a",), exit="a"), Binding(kind="none", why="it has no module"))
    error = refused(located(site(0, calls=2, bindings=half)), recipe({"all": True}))
    assert "it has no module" in error.what


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("name", sorted(gallery()))
def test_a_gallery_recipe_makes_a_plan_that_survives_json(name: str) -> None:
    import yaml

    wide = located(*(site(i, d_model=2048, d_in=2048, d_hidden=8192) for i in range(24)))
    made = select(wide, Recipe.model_validate(yaml.safe_load(gallery()[name])))
    assert made.substitutions
    assert Plan.model_validate_json(made.model_dump_json()) == made


def test_the_same_model_and_recipe_make_the_same_plan() -> None:
    wanted = recipe({"centred": {"count": 3, "stride": 8}})
    one, other = select(DEEP, wanted), select(Inspection.model_validate_json(DEEP.model_dump_json()), wanted)
    assert one == other
    assert one.digest() == other.digest()
    assert one.model_dump_json() == other.model_dump_json()


def test_another_recipe_makes_another_plan() -> None:
    digests = {select(DEEP, recipe({"layers": [i]}, heads=heads)).digest() for i in (3, 4) for heads in (1, 2)}
    assert len(digests) == 4


def test_the_plan_is_complete() -> None:
    """The plan states every default, so that it is enough to rebuild the model."""
    made = select(DEEP, recipe({"layers": [4]}))
    pool = made.pools["shared"]
    (one,) = made.substitutions
    assert (pool.value_dim, pool.dtype, pool.keys, pool.seed) == (64, "float32", 16, 0)
    assert set(one.options) == set(Recipe.model_validate(recipe({"all": True})).replace[0].kind.Options.model_fields)
    assert (one.kind, one.pool, one.placement, one.site.path) == ("memory_plus", "shared", "replace", "layers.4.mlp")


def test_options_of_the_recipe_are_kept() -> None:
    pool = select(DEEP, recipe({"layers": [4]}, pool={"value_dim": 48, "dtype": "bfloat16", "seed": 7})).pools["shared"]
    assert (pool.value_dim, pool.dtype, pool.seed) == (48, "bfloat16", 7)


def test_a_plan_is_frozen() -> None:
    made = select(DEEP, recipe({"all": True}))
    with pytest.raises(ValueError, match="frozen"):
        made.captured = "otherwise"  # type: ignore[misc]


def test_cost_counts_parameters_once_and_calls_each() -> None:
    once, thrice = (select(located(site(0, calls=calls)), recipe({"all": True})) for calls in (1, 3))
    assert thrice.before().parameters == once.before().parameters == 3 * 64 * 96
    assert thrice.before().flops == 3 * once.before().flops
    assert thrice.after().parameters == once.after().parameters


def test_a_shared_pool_is_counted_once() -> None:
    one, two = select(DEEP, recipe({"layers": [1]})), select(DEEP, recipe({"layers": [1, 2]}))
    layer = one.substitutions[0].cost(one.pools).parameters
    assert two.after().parameters - one.after().parameters == layer
    assert one.after().parameters == layer + 16 * 16 * 64


def test_centred_blocks_must_all_have_an_mlp() -> None:
    holes = located(*(site(i) for i in range(24) if i != 12))
    error = refused(holes, recipe({"centred": {"count": 3, "stride": 8}}))
    assert "block 12 of 'layers' has no MLP that fits" in error.what
    assert error.where == "replace[0].where.centred"


# ----------------------------------------------------------------------------------------- sites inside of a graph module


def graph(host: str) -> Binding:
    return Binding(kind="graph", exit=host, why="it has no module")


def test_a_site_inside_of_a_module_that_becomes_a_graph_is_reached_through_the_outermost_one() -> None:
    paths = ("layers.0", "layers.0.mlp.inner", "layers.0.mlp")
    module, inner, outer = (Binding(kind="module", entries=("m",), exit="m"), graph("layers.0.mlp"), graph("layers.0"))
    sites = (
        site(0, path=paths[0], bindings=(outer,)),
        site(0, path=paths[1], bindings=(inner,)),
        site(0, path=paths[2], calls=2, bindings=(outer, module)),
        site(0, path="layers.01.mlp", bindings=(module,)),
    )
    made = select(located(*sites), recipe({"all": True}))
    kinds = [[(b.kind, b.exit) for b in s.site.bindings] for s in made.substitutions]
    assert kinds == [[("graph", "layers.0")]] * 3 + [[("module", "m")]]
    exported = select(located(*sites), recipe({"all": True}), live=False)
    assert [s.site for s in exported.substitutions] == list(sites)


def narrow(sites: tuple[Site, ...], towers: dict[int, str], *wheres: dict[str, Any]) -> dict[int, list[str]]:
    """The paths among MIXED and some similar paths that each narrowed rule selects."""
    others = ("xtext.layers.0.mlp", "text.layers.0.mlp2", "text_layers.0.mlp")
    found = narrowed(sites, recipe(*wheres), towers)
    paths = [*(s.path for s in MIXED.sites), *others]
    return {index: [p for p in paths if re.search(str(rule.where.regex), p)] for index, rule in found.items()}


def test_rules_are_narrowed_to_the_sites_of_a_part() -> None:
    part = MIXED.sites[2:4]  # text.layers.0 and .1
    assert narrow(part, {}, {"path": "vision.*"}, {"all": True}, {"layers": [1, 5]}) == {
        1: ["text.layers.0.mlp", "text.layers.1.mlp"],
        2: ["text.layers.1.mlp"],
    }
    assert narrow(MIXED.sites, {}, {"layers": [0], "tower": "vision.blocks"}) == {0: ["vision.blocks.0.mlp"]}
    assert narrow(MIXED.sites[-1:], {}, {"layers": [0]}) == {}  # no block in this part


def test_a_rule_counts_blocks_in_the_tower_of_the_first_part() -> None:
    towers: dict[int, str] = {}
    assert narrow(MIXED.sites[2:], towers, {"layers": [0]}) == {0: ["text.layers.0.mlp"]}
    assert towers == {0: "text.layers"}
    with pytest.raises(SelectError, match=r"blocks are counted in one stack, and there are vision\.blocks") as caught:
        narrow(MIXED.sites[:2], towers, {"layers": [0]})
    assert caught.value.hint == "give the tower: `tower: text.layers`"
    assert narrow(MIXED.sites[-1:], towers, {"layers": [0]}) == {}
    with pytest.raises(SelectError, match="there is no block 6"):
        narrow(MIXED.sites[2:], towers, {"layers": [6]})
