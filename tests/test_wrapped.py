"""Models whose instances carry more than their class: hooks of accelerate, compiled or bound forwards, closures."""

from __future__ import annotations

import copy
import types

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import left_padded, tiny_llama, tiny_lora, tiny_prompt, two_model_logits
from transformers import CompileConfig

import svdecode
from svdecode.models.forward_inputs import CACHE

MU, ALPHA = 3.0, 0.01
MODES = ["paired", "lazy", "two_pass"]


@pytest.fixture(scope="module")
def lora():
    return tiny_lora()


def tokens(model, mode="auto", **options):
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
    return steered.generate(
        left_padded()[0], attention_mask=left_padded()[1], max_new_tokens=6, do_sample=False, **options
    )


def hooked(model):
    add_hook_to_module(model.get_base_model(), AlignDevicesHook(execution_device="cpu", io_same_device=True))


def hooked_layers(model):
    for layer in model.get_base_model().model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))


def compiled_forward(model):
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="eager")


def compiled_in_place(model):
    model.get_base_model().compile(backend="eager")


def compiled_layers(model):
    layers = model.get_base_model().model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    layers[1].compile(backend="eager")


def compiled_inside(model):
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")


def compiled_call(model):
    model.get_base_model().get_compiled_call(CompileConfig(backend="eager"))


def bound_forward(model):
    base = model.get_base_model()
    base.forward = types.MethodType(torch.no_grad()(type(base).forward), base)


def layer_known_by_another(model):
    first, second = model.get_base_model().model.layers
    second.__dict__["first"] = first
    second.forward = types.MethodType(lambda self, *a, **k: type(self).forward(self.first, *a, **k), second)


WRAPS = [
    hooked, hooked_layers, compiled_forward, compiled_in_place, compiled_layers, compiled_inside, compiled_call,
    bound_forward,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_whatever_is_around_the_forward_steering_is_the_same(lora, wrap, mode):
    model = copy.deepcopy(lora)
    wrap(model)
    options = {}
    if wrap is compiled_call:  # as generate() does on a GPU
        config = CompileConfig(backend="eager")
        config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": config}
    assert tokens(model, mode, **options).tolist() == tokens(lora, mode).tolist()


def test_a_compiled_model_is_steered_like_what_was_compiled(lora):
    expected = tokens(lora).tolist()
    assert tokens(torch.compile(lora, backend="eager")).tolist() == expected
    expert, amateur = tiny_llama(seed=1), tiny_llama(seed=2)
    steered = svdecode.steer(expert, pretrained=torch.compile(amateur, backend="eager"), mu=0.5)
    with torch.no_grad():
        pre = steered.pair_logits(input_ids=left_padded()[0])[0]
        torch.testing.assert_close(pre, amateur(left_padded()[0]).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_what_wraps_a_forward_is_part_of_both_models(lora, mode):
    """A bound method and a hook of torch on the model see its logits, and never steered log-probs."""
    ids = left_padded()[0][:1]
    pre, ft = two_model_logits(lora, ids, torch.ones_like(ids))
    model = copy.deepcopy(lora)
    base = model.get_base_model()

    def halved(self, *arguments, **keywords):
        output = type(base_of[0]).forward(self, *arguments, **keywords)
        output.logits = output.logits / 2
        return output

    base_of = [tiny_llama()]  # for its class alone
    base.forward = types.MethodType(halved, base)

    def shifted(module, arguments, output):
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output

    base.register_forward_hook(shifted)
    steered = svdecode.steer(model, mu=MU, alpha=ALPHA, mode=mode)
    more = torch.arange(pre.shape[-1])
    expected = svdecode.fused_steer(pre / 2 + more, ft / 2 + more, MU, alpha=ALPHA).logprobs
    torch.testing.assert_close(steered(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_references_among_modules_are_those_of_the_copy(lora):
    """A module that another one holds outside its children, as a bound method does."""
    model = copy.deepcopy(lora)
    layer_known_by_another(model)
    ids = left_padded()[0][:1]
    pre, ft = two_model_logits(model, ids, torch.ones_like(ids))
    found = svdecode.steer(model, mu=MU).pair_logits(input_ids=ids, use_cache=False)
    torch.testing.assert_close(found[0], pre, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], ft, rtol=1e-4, atol=1e-4)


def offload_to_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")


def offload_to_disk(model, folder):
    accelerate.disk_offload(model, str(folder), execution_device="cpu")


def dispatch_to_cpu_and_disk(model, folder):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    accelerate.dispatch_model(model.get_base_model(), places, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk, dispatch_to_cpu_and_disk])
def test_offloaded_weights(lora, offload, mode, tmp_path):
    model = copy.deepcopy(lora)
    offload(model, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    assert tokens(model, mode).tolist() == tokens(lora, mode).tolist()
    ids, mask = left_padded()
    thin = [
        svdecode.generate(svdecode.steer(m, mu=MU, alpha=ALPHA, mode=mode), ids, mask, max_new_tokens=6)
        for m in (model, lora)
    ]
    assert thin[0].tolist() == thin[1].tolist()
    # The owner's model still loads its own weights.
    options = {"max_new_tokens": 4, "do_sample": False, "input_ids": ids, "attention_mask": mask}
    assert model.generate(**options).tolist() == copy.deepcopy(lora).generate(**options).tolist()
    assert any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_offloaded_weights_under_virtual_tokens(kind):
    expected, model = tokens(tiny_prompt(kind)), tiny_prompt(kind)
    accelerate.cpu_offload(model.get_base_model(), execution_device="cpu")
    assert tokens(model).tolist() == expected.tolist()


def test_a_hook_of_the_copy_has_a_state_of_its_own(lora):
    model = copy.deepcopy(lora)
    accelerate.cpu_offload(model, execution_device="cpu")
    steered = svdecode.steer(model, mu=MU)
    hook, own = (m.model.norm._hf_hook for m in (model.get_base_model(), steered))
    assert hook is not own
    assert own.weights_map is hook.weights_map


def test_offloaded_as_one_block_is_refused(lora):
    model = copy.deepcopy(lora)
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaMLP"])
    with pytest.raises(ValueError, match=r"mlp is offloaded as one block.*without preload_module_classes"):
        svdecode.steer(model, mu=MU)


def test_a_calibration_for_an_offloaded_adapter_is_refused(lora):
    model = copy.deepcopy(lora)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"are offloaded.*pass a number"):
        svdecode.steer(model)


def closure(module):
    old = module.forward
    module.forward = lambda *arguments, **keywords: old(*arguments, **keywords)


def decorated(module):
    module.forward = torch.no_grad()(module.forward)


def bound_closure(module):
    old = module.forward
    module.forward = types.MethodType(lambda self, *arguments, **keywords: old(*arguments, **keywords), module)


def default(module):
    module.forward = lambda *arguments, old=module.forward, **keywords: old(*arguments, **keywords)


class Caller:
    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments, **keywords):
        return self.function(*arguments, **keywords)


def called(module):
    module.forward = Caller(module.forward)


def by_global_name(module):
    globals()["_OLD"] = module.forward
    module.forward = lambda *arguments, **keywords: _OLD(*arguments, **keywords)  # noqa: F821


def under_a_hook(module):
    closure(module)
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))


@pytest.mark.parametrize(
    "wrap", [closure, decorated, bound_closure, default, called, by_global_name, under_a_hook], ids=lambda w: w.__name__
)
@pytest.mark.parametrize("path", ["", "model.layers.1", "model.layers.0.self_attn.q_proj"])
def test_a_forward_that_runs_the_original_is_refused(lora, wrap, path):
    model = copy.deepcopy(lora)
    wrap(model.get_base_model().get_submodule(path))
    where = f"model.{path}" if path else "model"
    with pytest.raises(ValueError, match=rf"^{where} has a '_?(old_)?forward' of its own.*types\.MethodType"):
        svdecode.steer(model, mu=MU)
    if path:
        return
    with pytest.raises(ValueError, match="pretrained has a"):
        svdecode.steer(tiny_llama(), pretrained=model.get_base_model(), mu=MU)


def test_other_methods_on_the_instance(lora):
    model = copy.deepcopy(lora)
    base = model.get_base_model()
    base.generate = lambda *arguments, **keywords: base.generation_config
    with pytest.raises(ValueError, match="model has a 'generate' of its own"):
        svdecode.steer(model, mu=MU)
    base.generate = types.MethodType(lambda self, *a, **k: (type(self).generate(self, *a, **k), "mine"), base)
    assert tokens(model)[0].tolist() == tokens(lora).tolist()
    assert tokens(model)[1] == "mine"


def test_training_mode_reaches_the_model_inside(lora):
    steered = svdecode.steer(lora, mu=MU)
    assert not steered._inner.training
    assert steered.train()._inner.training
    assert CACHE in steered(input_ids=left_padded()[0], use_cache=True)
