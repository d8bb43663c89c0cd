"""What cannot be served is refused in a sentence before weights are loaded."""

from __future__ import annotations

import shutil

import kit
import pytest
import vllm
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs

from svdecode.serving import engine_args, engine_config, names
from svdecode.serving.engine_config import prepare


@pytest.fixture
def llama(models, tmp_path):
    """A copy, which a test may change."""
    return shutil.copytree(kit.tiny(models, "llama"), tmp_path / "llama")


def configured(folder, **options):
    """As far as vLLM goes before it starts a process."""
    arguments = engine_args(folder, folder / "lora", mu=0.5, **{**kit.small(), **options})
    return EngineArgs(**arguments).create_engine_config()


def other(folder, kind, architecture, **options):
    """Put another model's configuration beside the adapter."""
    config = AutoConfig.for_model(kind, **{**kit.GROUPED, **options})
    config.architectures = [architecture]
    config.save_pretrained(folder)


def test_a_plain_engine_has_the_processor_and_the_digest_of_its_adapter(llama):
    config = configured(llama)
    assert config.model_config.logits_processors == [names.PROCESSOR]
    before = config.additional_config[names.KEY]
    weights = (llama / "lora" / "adapter_model.safetensors").read_bytes()
    (llama / "lora" / "adapter_model.safetensors").write_bytes(weights[:-4] + b"\0\0\1\0")
    assert configured(llama).additional_config[names.KEY] != before


def test_lora_of_vllm(llama):
    with pytest.raises(ValueError, match="has its own adapter"):
        configured(llama, enable_lora=True)
    arguments = engine_args(llama, llama / "lora", mu=0.5, **kit.small())
    with pytest.raises(ValueError, match="has its own adapter"):
        EngineArgs(**arguments, enable_lora=True).create_engine_config()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_format": "sharded_state"}, "load_format='sharded_state' loads no adapter"),
        ({"model_impl": "transformers"}, "model_impl='transformers': svdecode chooses"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "do not name the adapter"),
        ({"kv_sharing_fast_prefill": True}, "counts half the tokens"),
        ({"enable_return_routed_experts": True}, "those of both models' tokens"),
    ],
)
def test_options_that_break_the_doubling(llama, options, words):
    with pytest.raises(ValueError, match=words):
        configured(llama, **options)


def test_context_parallelism(llama):
    config = configured(llama)
    config.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(ValueError, match="context parallelism, which would mix the heads"):
        prepare(config)


def test_weights_that_are_loaded_past_the_adapter(llama):
    arguments = engine_args(llama, llama / "lora", mu=0.5, **kit.small())
    with pytest.raises(ValueError, match="--load-format dummy, which loads no adapter"):
        EngineArgs(**arguments, load_format="dummy").create_engine_config()


@pytest.mark.engine
def test_a_way_of_loading_that_nobody_knows(llama, monkeypatch):
    """Without the adapter both streams would be the pre-trained model."""
    monkeypatch.setattr(engine_config, "PAST_LOADING", ())
    arguments = engine_args(llama, llama / "lora", mu=0.5, **kit.small())
    with pytest.raises(RuntimeError, match="the adapter was not loaded"):
        kit.ask(LLM(**arguments, load_format="dummy"), kit.prompts())


def test_heads_that_draft(llama):
    other(llama / "head", "llama", "EagleLlamaForCausalLM")
    speculation = {"method": "eagle", "model": str(llama / "head"), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="speculation by 'eagle', whose head reads the hidden states"):
        configured(llama, speculative_config=speculation)


def test_latent_attention(llama):
    other(
        llama,
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        first_k_dense_replace=3,
    )
    with pytest.raises(ValueError, match=r"latent attention \(MLA\).*svdecode\.steer"):
        configured(llama)


@pytest.mark.parametrize(("kind", "architecture"), [("mamba", "MambaForCausalLM"), ("jamba", "JambaForCausalLM")])
def test_recurrent_layers(llama, kind, architecture):
    other(llama, kind, architecture)
    with pytest.raises(ValueError, match=r"recurrent layers.*svdecode\.steer"):
        configured(llama)


def test_experts_in_parallel(llama):
    other(llama, "mixtral", "MixtralForCausalLM")
    with pytest.raises(ValueError, match="experts spread by data or expert parallelism"):
        configured(llama, enable_expert_parallel=True)


def test_a_dictionary_that_is_written_by_hand(llama):
    for values, words in (({"mu": 1}, "needs its settings"), ({"adapter": str(llama), "mu": 1}, "is missing")):
        overrides = {"architectures": ["SteeredLlamaForCausalLM"], names.KEY: values}
        with pytest.raises(ValueError, match=words):
            EngineArgs(str(llama), hf_overrides=overrides, **kit.small()).create_engine_config()


def test_another_version_of_vllm(llama, monkeypatch):
    monkeypatch.setattr(names, "vllm_version", lambda: "0.33.1")
    with pytest.raises(ValueError, match=r"vLLM 0\.33\.1 is outside .* tested with, 0\.32: .*SVDECODE_ANY_VLLM=1"):
        configured(llama)
    monkeypatch.setenv(names.ANY_VERSION, "1")
    configured(llama)


def test_a_missing_strength_and_a_foreign_calibration(llama):
    with pytest.raises(ValueError, match="no calibration in"):
        engine_args(llama, llama / "lora")


def test_a_model_of_more_layers_than_the_adapter_was_trained_on(models, tmp_path):
    """It names its layers one by one; what it was trained on is not here. Also where vLLM is started without engine_args."""
    targets = [f"model.layers.{layer}.mlp.up_proj" for layer in range(3)]
    llama = shutil.copytree(kit.tiny(models, "llama", target_modules=targets), tmp_path / "llama")
    arguments = engine_args(llama, llama / "lora", mu=0.5, **kit.small())
    other(llama, "llama", "LlamaForCausalLM", num_hidden_layers=4)
    with pytest.raises(
        ValueError, match="a model of 3 layers, whose modules it names one by one, and this model has 4"
    ):
        configured(llama)
    with pytest.raises(
        ValueError, match="a model of 3 layers, whose modules it names one by one, and this model has 4"
    ):
        EngineArgs(**arguments).create_engine_config()


@pytest.mark.engine
def test_layers_that_the_adapter_has_not(models, tmp_path):
    """Their names are the others': vLLM alone would leave these layers as they are."""
    folder = shutil.copytree(kit.tiny(models, "llama", target_modules=["q_proj", "down_proj"]), tmp_path / "llama")
    path = folder / "lora" / "adapter_model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if "layers.2." not in name}, path)
    with pytest.raises(
        ValueError, match=r"nothing for model\.layers\.2\.\S+ \(2 modules are missing\): use the model that"
    ):
        kit.engine(folder)


@pytest.mark.engine
def test_layers_that_the_model_has_not(models, tmp_path):
    folder = shutil.copytree(kit.tiny(models, "opt"), tmp_path / "opt")
    shutil.copytree(kit.tiny(models, "llama") / "lora", folder / "other")
    with pytest.raises(
        ValueError, match=r"which are no linear layers of vLLM's SteeredOPTForCausalLM; .*merge_and_unload"
    ):
        kit.engine(folder, lora="other")


def test_a_calibration_beside_the_adapter(llama):
    import torch
    from transformers import AutoModelForCausalLM

    import svdecode
    from svdecode.models.loading import load_adapter

    base = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.randint(3, kit.VOCABULARY, (4, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    svdecode.calibrate(load_adapter(base, llama / "lora"), [batch], alpha=0.0).save_pretrained(llama / "lora")
    known = svdecode.Calibration.from_pretrained(llama / "lora")
    found = engine_args(llama, llama / "lora")["hf_overrides"][names.KEY]
    assert (found["mu"], found["alpha"]) == (known.mu, 0.0)
    shutil.copy(llama / "lora" / "svdecode.json", llama)
    for kind in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(kit.tiny(llama.parent, "llama", r=2) / "lora" / kind, llama)
    with pytest.raises(ValueError, match="for another adapter"):
        engine_args(llama, llama)


def test_the_version_that_the_tests_run_with():
    assert vllm.__version__.startswith("0.32.")
