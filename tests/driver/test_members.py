"""Members of a run: by count, by manifest, by selection; what is wrong is named by row and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from allele.api.population import Group
from allele.api.run import Select
from allele_driver.members import InvalidInput, ManifestError, members_of, parts_of, select
from tests.driver.driver_parts import bundle


def by_manifest(tmp_path: Path, text: str, **fields: Any) -> Group:
    folder = tmp_path / "tenants"
    folder.mkdir(exist_ok=True)
    (folder / "members.jsonl").write_text(text)
    return Group.model_validate({"name": "g", "members": {"manifest": {"configMap": "tenants"}}, **fields})


def test_members_by_count_are_named_after_their_group(tmp_path: Path) -> None:
    group = Group.model_validate({"name": "taste", "members": {"count": 3}, "parameters": {"a": 1}, "seed": 5})
    found = members_of(group, tmp_path)
    assert [m.name for m in found] == ["taste-0000", "taste-0001", "taste-0002"]
    assert [m.index for m in found] == [0, 1, 2]
    assert all(m.parameters == {"a": 1} and m.adapter.rank == 8 for m in found)
    assert len({m.seed for m in found}) == 3
    assert [m.seed for m in found] == [m.seed for m in members_of(group, tmp_path)]
    other = Group.model_validate({"name": "taste", "members": {"count": 3}, "seed": 6})
    assert {m.seed for m in found}.isdisjoint(m.seed for m in members_of(other, tmp_path))


def test_a_manifest_overrides_the_groups_parameters(tmp_path: Path) -> None:
    text = '{"name": "alice", "parameters": {"sign": "*"}}\n\n{"name": "Bob.2"}\n'
    found = members_of(by_manifest(tmp_path, text, parameters={"sign": "-", "x": 1}), tmp_path)
    assert [(m.name, dict(m.parameters)) for m in found] == [
        ("alice", {"sign": "*", "x": 1}),
        ("Bob.2", {"sign": "-", "x": 1}),
    ]


@pytest.mark.parametrize(
    ("row", "column", "expected", "found"),
    [
        ('{"name": "a/b"}', "name", "A-Z a-z 0-9", "'a/b'"),
        ('{"name": "x@1"}', "name", "A-Z a-z 0-9", "'x@1'"),
        ('{"name": "' + "n" * 64 + '"}', "name", "1 to 63", "nnn"),
        ('{"name": "tab\\t"}', "name", "A-Z a-z 0-9", "tab"),
        ('{"name": 7}', "name", "A-Z a-z 0-9", "7"),
        ("{}", "name", "A-Z a-z 0-9", "None"),
        ('{"name": "ok"}', "name", "not used before", "'ok'"),
        ('{"name": "fine", "parameters": [1]}', "parameters", "an object", "[1]"),
        ('{"name": "fine", "paramters": {}}', "paramters", "only the columns", "{}"),
        ('{"name": "fine",}', "17", "one JSON object", '{"name"'),
        ('["fine"]', "1", "an object", "['fine']"),
    ],
)
def test_a_bad_row_is_refused_by_row_and_column(
    tmp_path: Path, row: str, column: str, expected: str, found: str
) -> None:
    with pytest.raises(ManifestError) as refused:
        members_of(by_manifest(tmp_path, f'{{"name": "ok"}}\n{row}\n'), tmp_path)
    assert (refused.value.row, refused.value.column) == (2, column)
    text = str(refused.value)
    assert "members.jsonl: row 2" in text and expected in text and found in text


@pytest.mark.parametrize(("text", "what"), [("\n", "at least one row"), (None, "expected a manifest")])
def test_an_empty_or_missing_manifest_is_refused(tmp_path: Path, text: str | None, what: str) -> None:
    group = by_manifest(tmp_path, text or "")
    if text is None:
        (tmp_path / "tenants/members.jsonl").unlink()
    with pytest.raises(InvalidInput, match=what):
        members_of(group, tmp_path)


def test_selection_by_range_and_names(tmp_path: Path) -> None:
    group = Group.model_validate({"name": "g", "members": {"count": 5}})
    members = members_of(group, tmp_path)

    def names(**fields: Any) -> list[str]:
        return [m.name for m in select(members, Select.model_validate({"group": "g", **fields}))]

    assert names() == [f"g-000{i}" for i in range(5)]
    assert names(range={"first": 1, "count": 2}) == ["g-0001", "g-0002"]
    assert names(names=["g-0004", "g-0000"]) == ["g-0004", "g-0000"]
    with pytest.raises(InvalidInput, match=r"at most 5 members.*found 4\+2"):
        names(range={"first": 4, "count": 2})
    with pytest.raises(InvalidInput, match="found 'nobody'"):
        names(names=["nobody"])


def test_a_member_may_be_in_one_part_of_a_run_only(tmp_path: Path) -> None:
    group = bundle("p", uid="u", members=4, steps=1).run_spec.groups[0].model_dump(by_alias=True)
    first = group | {"select": {"group": "taste", "range": {"first": 0, "count": 3}}}
    second = group | {"select": {"group": "taste", "range": {"first": 2, "count": 2}}}
    given = bundle("p", uid="u", members=4, steps=1, groups=[first, second])
    with pytest.raises(InvalidInput, match=r"groups\[1\]\.select.*'taste-0002' in groups\[0\] too"):
        parts_of(given, tmp_path)
    unknown = bundle("p", uid="u", members=4, steps=1, groups=[group | {"select": {"group": "nope"}}])
    with pytest.raises(InvalidInput, match=r"expected one of \['taste'\].*found 'nope'"):
        parts_of(unknown, tmp_path)
