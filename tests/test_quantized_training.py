"""Training beside weights that are quantised: LoRA, gradients, what cannot be trained."""

import pytest
import torch
from pairs import some_ids, weigh
from quantized_models import full, put_lora, quantized

from fastgpt.model.quantization import QuantizedLinear
from fastgpt.quantized_weight import PRECISIONS, dequantize

pytestmark = pytest.mark.filterwarnings("ignore::fastgpt.BackendWarning")


class TestTraining:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_lora_learns(self, precision):
        model = quantized(precision, tied=True)
        put_lora(model)
        stored = {name: b.clone() for name, b in model.named_buffers()}
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n.rpartition(".")[2] for n in trained} == {"A", "B"}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.train()
        ids, losses = some_ids(4, 12), []
        for _ in range(30):
            optimizer.zero_grad()
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(torch.equal(b, stored[name]) for name, b in model.named_buffers())

    @pytest.mark.usefixtures("float32_products")
    def test_gradients_reach_what_lies_before(self):
        """Those of the model with the same weights in full precision."""
        model, wide = quantized(), full()
        for path, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                wide.get_submodule(path).weight.data = dequantize(
                    layer.quantized_weight, torch.float32
                )
        grads = []
        for one in (model, wide):
            one.pos_emb.requires_grad_(True)
            weigh(one(some_ids())).backward()
            grads.append(one.pos_emb.weight.grad)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)

    def test_a_weight_cannot_be_trained(self):
        model = quantized(tied=True)
        for layer in (model.out_head, model.tok_emb):
            with pytest.raises(RuntimeError, match=r"held in int8 and cannot be trained: train a"):
                layer.requires_grad_(True)
            layer.requires_grad_(False)
        with pytest.raises(RuntimeError, match="no weight to initialise"):
            model.out_head.reset_parameters()
        model.requires_grad_(True)  # what is in full precision can
        assert all(p.requires_grad for p in model.parameters())
        assert not any(b.requires_grad for b in model.buffers())
