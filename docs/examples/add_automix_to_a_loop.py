"""AutoMix in a training loop of your own: plain PyTorch, here on the handwritten digits that come with scikit-learn.

    python docs/examples/add_automix_to_a_loop.py          # about a minute on two CPU cores

What AutoMix adds to a loop is marked with +.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from automix_dist.automix import AutoMix  # +
from automix_dist.backbone import create_backbone  # +
from automix_dist.config import AutoMixConfig, ModelConfig  # +
from automix_dist.momentum import MomentumUpdate  # +

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 12

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
images = F.interpolate(
    (images - 0.3) / 0.38, size=(32, 32), mode="bilinear"
)  # normalised; uint8 [B, H, W, 3] works too
train, val = (
    TensorDataset(images[i], torch.tensor(digits.target)[i])
    for i in (torch.arange(0, 1440), torch.arange(1440, len(images)))
)
loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

# Any module with the attributes of automix_dist.backbone.Backbone can be the backbone; here a small timm ResNet.
layers = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
backbone = create_backbone(ModelConfig("resnet18", timm_kwargs=layers), feature=1, image_size=32)
config = AutoMixConfig(norm="layer")
# + Instead of backbone and head. Immediate backward: without it activations take three times the memory.
model = AutoMix(backbone, num_classes=10, config=config, immediate_backward=True).to(device)
update_momentum = MomentumUpdate(model)  # +
optimizer = torch.optim.SGD(
    [{"params": model.query.parameters()}, {"params": model.mix_block.parameters(), "lr": 0.2}],  # +
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))

step = 0
for epoch in range(EPOCHS):
    model.train()
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        draws = model.draw(x, seed=0, step=step)  # + lambdas and pairs of this step
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # holds inside of AutoMix too
            losses = model(x, y, draws, mask_loss_weight=0.1)  # +
        losses.total.backward()
        optimizer.step()
        update_momentum(0.99)  # + after each optimizer step; 0.999 and more for long trainings
        schedule.step()
        step += 1
    model.eval()
    correct = 0
    with torch.no_grad():
        for x, y in DataLoader(val, batch_size=128):
            correct += (model(x.to(device)).query.argmax(dim=1).cpu() == y).sum().item()  # + without draws: logits
    print(f"epoch {epoch + 1}: loss {losses.total.item():.3f}, top-1 {correct / len(val):.2%}")
