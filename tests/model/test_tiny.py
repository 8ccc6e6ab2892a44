from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError, WeightsError
from model.consistentid import encode_images, encode_text, load_base
from model.prompt import tokenize_marked
from model.spec import SPECS
from model.tiny import make_tiny_base
from model.vocabulary import clip_tokenizer

TINY = SPECS["tiny"]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_clip_vocabulary(vocab: Path) -> None:
    tokenizer = clip_tokenizer(vocab)
    assert len(tokenizer) == 49_408
    # the ids of OpenAI's implementation
    assert tokenizer.encode("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 49_407


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "x.gz").write_bytes(gzip.compress(b"head\na b\n"))
    with pytest.raises(WeightsError, match="48894 merges"):
        clip_tokenizer(tmp_path / "x.gz")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(
    tiny_base: Path, vocab: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    assert files(make_tiny_base(tmp_path / "same", vocab, 0)) == files(tiny_base)
    assert torch.equal(torch.get_rng_state(), before)
    other = files(make_tiny_base(tmp_path / "other", vocab, 1))
    assert other.keys() == files(tiny_base).keys()
    changed = {name for name, data in other.items() if data != files(tiny_base)[name]}
    assert (
        "unet/diffusion_pytorch_model.safetensors" in changed
        and "tokenizer/tokenizer.json" not in changed
    )


def test_an_existing_base_and_a_foreign_folder_are_left_unchanged(
    vocab: Path, tiny_base: Path, tmp_path: Path
) -> None:
    stamp = (tiny_base / "unet" / "config.json").stat().st_mtime_ns
    make_tiny_base(tiny_base, vocab, 0)
    assert (tiny_base / "unet" / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="seed 0, not 1"):
        make_tiny_base(tiny_base, vocab, 1)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        make_tiny_base(tmp_path, vocab, 0)


def test_loaded_base_is_frozen_and_fits_the_spec(tiny_base: Path) -> None:
    base = load_base(TINY, tiny_base)
    assert not any(p.requires_grad for module in base.modules.values() for p in module.parameters())
    ids = torch.tensor([tokenize_marked("a face", base.tokenizer, keep_eos=True).ids])
    assert encode_text(base, ids)[0].shape == (1, 77, TINY.cross_attention_dim)
    hidden = encode_images(
        base.image_encoder, torch.zeros(2, 3, TINY.vision_size, TINY.vision_size)
    )
    assert hidden.shape == (2, 50, TINY.vision_dim)
    assert base.vae_factor == 4
    assert base.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 4, 16, 16)


def test_a_missing_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="make_tiny_base"):
        load_base(TINY)
    with pytest.raises(WeightsError, match="diffusers' layout"):
        load_base(TINY, tmp_path)
