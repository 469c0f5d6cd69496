"""Names out of files and links never lead out of the folder that they were found in."""

from __future__ import annotations

import json
import os

import pytest

from idp_peft.files.inside_folder import files_inside, inside, plain_name
from idp_peft.hub.adapter_folder import push_adapter
from idp_peft.serving import ExportedModel, export_to_vocab
from idp_peft.serving.tensor_files import INDEX
from tests.tiny_serving import saved

SECRET = "what nobody may see"


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\0b", None, 3, ["x"], {"x": 1}]
)
def test_a_name_from_a_file_is_a_plain_one(name):
    with pytest.raises(ValueError, match="the shard must be a plain file name in its own folder, got"):
        plain_name(name, "the shard")
    assert plain_name("model-00001-of-00002.safetensors", "the shard") == "model-00001-of-00002.safetensors"


def sharded(one):
    """The saved base with an index over its one file."""
    from safetensors import safe_open

    with safe_open(one.base / "model.safetensors", "pt") as file:
        places = dict.fromkeys(file.keys(), "shard.safetensors")
    (one.base / "model.safetensors").rename(one.base / "shard.safetensors")
    return places


@pytest.mark.parametrize(
    "name", ["../../victim", "../victim.safetensors", "/victim.safetensors", "config.json", 7, None, ["shard"]]
)
def test_a_weight_map_cannot_name_a_file_elsewhere(name, tmp_path):
    one = saved(tmp_path / "deep" / "er", "llama")
    victims = [tmp_path / "victim", tmp_path / "deep" / "victim.safetensors"]
    for victim in victims:
        victim.write_text(SECRET)
    places = sharded(one)
    (one.base / INDEX).write_text(json.dumps({"weight_map": {**places, next(iter(places)): name}}))
    with pytest.raises(ValueError, match="must be a"):
        export_to_vocab(one.adapter, tmp_path / "out" / "exported", one.base)
    assert all(victim.read_text() == SECRET for victim in victims)
    assert not (tmp_path / "out" / "exported").exists()


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}, 3, None])
def test_an_index_without_places_is_refused(index, tmp_path):
    one = saved(tmp_path, "llama")
    sharded(one)
    (one.base / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must hold a `weight_map`"):
        export_to_vocab(one.adapter, tmp_path / "exported", one.base)


def test_an_index_that_names_the_wrong_file_is_refused(tmp_path):
    one = saved(tmp_path, "llama")
    places = sharded(one)
    (one.base / INDEX).write_text(json.dumps({"weight_map": {**places, "model.more": "shard.safetensors"}}))
    with pytest.raises(ValueError, match=r"says that 'model.more' is in 'shard.safetensors', but it is not"):
        export_to_vocab(one.adapter, tmp_path / "exported", one.base)


@pytest.mark.parametrize("name", ["LICENSE", "modeling_own.py", "config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_a_base_does_not_reach_the_export(name, tmp_path):
    one = saved(tmp_path, "llama")
    outside = tmp_path / "outside"
    if (one.base / name).exists():
        (one.base / name).rename(outside)
    else:
        outside.write_text(SECRET)
    (one.base / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of its folder, to {outside}"):
        export_to_vocab(one.adapter, tmp_path / "exported", one.base)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    "name", ["README.md", "tokenizer.json", "vocab.txt", "adapter_model.safetensors", "adapter_config.json"]
)
def test_a_link_out_of_an_adapter_is_not_pushed(name, tmp_path, monkeypatch):
    one = saved(tmp_path, "llama")
    outside = tmp_path / "outside"
    if (one.adapter / name).exists():
        (one.adapter / name).rename(outside)
    else:
        outside.write_text(SECRET)
    (one.adapter / name).symlink_to(outside)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of its folder, to {outside}"):
        push_adapter(one.adapter, "somebody/something")


def test_links_within_a_folder_and_in_the_cache_of_the_hub_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real.txt").write_text("text")
    (tmp_path / "folder" / "link.txt").symlink_to("real.txt")
    assert [path.name for path in files_inside(tmp_path / "folder", ["*.txt", "*"])] == ["link.txt", "real.txt"]
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "digest").write_text("text")
    (snapshot / "config.json").symlink_to(os.path.relpath(repository / "blobs" / "digest", snapshot))
    assert inside(snapshot, "config.json").read_text() == "text"
    (tmp_path / "secret").write_text(SECRET)
    (snapshot / "other.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link that leads out of its folder"):
        inside(snapshot, "other.json")


WRONG = {
    "endless rows": {"never_generated": [97, 10**13]},
    "rows of the base": {"never_generated": [5, 128]},
    "rows as texts": {"never_generated": ["97", "128"]},
    "three ends": {"never_generated": [97, 128, 1]},
    "a row too far": {"prompts": [{"name": None, "token_ids": [10**6], "tokens": ["x"]}]},
    "a row of the base": {"prompts": [{"name": None, "token_ids": [3], "tokens": ["x"]}]},
    "true as a row": {"prompts": [{"name": None, "token_ids": [True], "tokens": ["x"]}]},
    "a text for the rows": {"prompts": [{"name": None, "token_ids": "97", "tokens": ["x", "y"]}]},
    "a name too few": {"prompts": [{"name": None, "token_ids": [97, 98], "tokens": ["x"]}]},
    "a number for a name": {"prompts": [{"name": 3, "token_ids": [97], "tokens": ["x"]}]},
    "no prompt": {"prompts": []},
    "a list of numbers": {"prompts": [3]},
    "tied to a text": {"tied": "no"},
    "half a row": {"vocab_size": 97.0},
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_list_of_prompts_that_is_none_is_refused(name, tmp_path):
    right = {
        "vocab_size": 97,
        "tied": False,
        "never_generated": [97, 128],
        "prompts": [{"name": None, "token_ids": [97], "tokens": ["<|idp:0:00|>"]}],
    }
    file = tmp_path / "idp_prompts.json"
    file.write_text(json.dumps(right))
    assert ExportedModel.from_folder(tmp_path).token_ids == [[97]]
    file.write_text(json.dumps(right | WRONG[name]))
    with pytest.raises(ValueError, match="is no model that `idp-peft export` wrote"):
        ExportedModel.from_folder(tmp_path)
