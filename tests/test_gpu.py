"""What only a GPU can show: graphs, streams, a second device, tensors of more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from rows import model_rows

import svdecode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _each_backend(backend):
    """All of this file with Triton, and with the CUDA C++ kernels where they are built."""


def inputs(rows=4, vocabulary=128_256, device="cuda"):
    return (x.to(device, torch.bfloat16) for x in model_rows(rows, vocabulary))


def decode_step(pre, ft, labels):
    out = svdecode.fused_steer(pre, ft, labels=labels)
    sampled = svdecode.steer_sample(pre, ft, 0.5, temperature=0.8, top_k=20, top_p=0.9)
    greedy = svdecode.steer_sample(pre, ft, 0.5, temperature=0.0)
    best = svdecode.steer_topk(pre, ft, 0.5, k=8)
    return (*out, *sampled, *greedy, *best, *svdecode.optimal_strength(pre, ft, labels))


def test_graph_capture_and_replay():
    pre, ft = inputs()
    labels = ft.argmax(-1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        decode_step(pre, ft, labels)  # compile outside the capture
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_step(pre, ft, labels)
    other_pre, other_ft = inputs()
    pre.copy_(other_ft)
    ft.copy_(other_pre)
    graph.replay()
    torch.cuda.synchronize()
    eager = svdecode.fused_steer(pre, ft, labels=labels)
    for got, expected in zip(captured, eager, strict=False):
        assert torch.equal(got, expected)
    assert torch.equal(captured[8], svdecode.steer_sample(pre, ft, 0.5, temperature=0.0)[0])
    assert torch.equal(captured[10], svdecode.steer_topk(pre, ft, 0.5, k=8)[0])


def test_two_streams_at_once():
    pairs = [tuple(inputs(64)) for _ in range(2)]
    expected = [svdecode.fused_steer(a, z, 0.5).logprobs for a, z in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in pairs]
    results = [[], []]
    for _ in range(10):
        for stream, (a, z), found in zip(streams, pairs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(svdecode.fused_steer(a, z, 0.5).logprobs)
    torch.cuda.synchronize()
    for found, truth in zip(results, expected, strict=True):
        assert all(torch.equal(x, truth) for x in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_the_device_of_the_tensors_not_the_current_one():
    pre, ft = inputs(device="cuda:1")
    assert torch.cuda.current_device() == 0
    out = svdecode.fused_steer(pre, ft, 0.5)
    assert out.logprobs.device.index == 1
    torch.testing.assert_close(out.logprobs.cpu(), svdecode.fused_steer(pre.cpu(), ft.cpu(), 0.5).logprobs)


def test_more_than_two_billion_elements():
    rows, vocabulary = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB")
    pre, ft = (torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    a, z = inputs(1, vocabulary)
    pre[-1], ft[-1] = a[0], z[0]
    out = svdecode.fused_steer(pre, ft, 0.5)
    assert torch.equal(out.logprobs[-1], svdecode.fused_steer(a, z, 0.5).logprobs[0])
    assert out.num_kept[0] == vocabulary


def test_no_host_synchronisation():
    pre, ft = inputs()
    labels = ft.argmax(-1)
    decode_step(pre, ft, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_step(pre, ft, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
