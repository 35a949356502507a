"""Where the indexer's method is wrapped, and where it stays upstream's."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from sglang_nsa_fused import hooks, releases
from sglang_nsa_fused.settings import Settings

RELEASE, VERSION = releases.DSA_0_5_23, "0.5.23"
WRAPPED = "sglang-nsa-fused: DeepGEMM gets all rows of the indexer's logits in one call"


class Indexer:
    def _get_topk_paged(self, forward_batch, layer_id, q_fp8, weights, metadata):
        return self.sm_count


class Changed:
    def _get_topk_paged(self, forward_batch, q_fp8):
        return self.sm_count


def decide(monkeypatch, cls=Indexer, release=RELEASE, version=VERSION, capability=(9, 0), device="cuda", **settings):
    """The class after the decision, a copy of this one. cls: None where sglang's module has none."""
    cls = cls and type("Indexer", (cls,), {})
    if release.indexer:
        monkeypatch.setitem(sys.modules, release.indexer, SimpleNamespace(**({"Indexer": cls} if cls else {})))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    ours = object.__new__(hooks.Hooks)
    ours.release, ours._version = release, version
    ours._settings = Settings(**{"enabled": True, "required": False, "allowlist": None, **settings})
    hooks._refuse.cache_clear()
    ours._give_all_rows(device)
    return cls


def is_wrapped(cls) -> bool:
    return "_get_topk_paged" in vars(cls)


def test_on_sm90_it_is_wrapped_and_said(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    cls = decide(monkeypatch)
    assert is_wrapped(cls)
    assert [record.getMessage() for record in caplog.records] == [WRAPPED]
    indexer = cls()
    indexer.sm_count = 132
    planned, without = SimpleNamespace(paged_mqa_schedule_metadata=object()), SimpleNamespace()
    assert indexer._get_topk_paged(None, 0, range(384), None, planned) == 384
    assert indexer._get_topk_paged(None, 0, q_fp8=range(6), weights=None, metadata=planned) == 132
    assert indexer._get_topk_paged(None, 0, range(384), None, without) == 132
    assert indexer.sm_count == 132


@pytest.mark.parametrize(
    "otherwise",
    [
        {"capability": (10, 0)},
        {"capability": (12, 0)},
        {"device": "cpu"},
        {"version": "0.5.24"},  # the newest known release is tried, with its own indexer
        {"release": releases.DSA_0_5_15, "version": "0.5.19"},
        {"keep_chunks": True},
    ],
)
def test_elsewhere_it_stays(monkeypatch, caplog, otherwise):
    caplog.set_level(logging.INFO)
    assert not is_wrapped(decide(monkeypatch, **otherwise))
    assert not caplog.records


def test_a_model_without_the_indexer_is_nothing_to_say(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    decide(monkeypatch, None)
    assert not caplog.records


def test_a_changed_sglang_is_said_and_keeps_its_own(monkeypatch, caplog):
    assert not is_wrapped(decide(monkeypatch, Changed))
    assert "sglang was changed: expected" in caplog.text and "Indexer._get_topk_paged(self, forward_batch," in caplog.text


def test_a_changed_sglang_ends_the_process_where_the_plugin_is_required(monkeypatch):
    with pytest.raises(SystemExit, match="sglang was changed"):
        decide(monkeypatch, Changed, required=True)
