"""AutoMix, or any policy of docs/policies.md, in a script in the style of timm's train.py: its model, its optimizer,
its schedule, its meters. The place of timm's `Mixup` and loss function is taken by the policy's model.

    python docs/examples/timm_style_train.py resnet18 --policy samix --epochs 2
"""

import argparse

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy

from automix_dist.backbone import create_backbone, layer_kwargs
from automix_dist.config_file import from_dict
from automix_dist.model import build_model
from automix_dist.momentum import MomentumUpdate
from automix_dist.policy import needed_feature


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a timm model")
    parser.add_argument("--policy", default="automix")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    return parser.parse_args()


def loader(batches: int, batch_size: int, image_size: int, seed: int):
    """Stands in for timm.data.create_loader: images whose class is their brightest corner."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        target = torch.randint(0, 4, (batch_size,), generator=generator)
        images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
        half = image_size // 2
        for image, corner in zip(images, target.tolist(), strict=True):
            image[:, (corner // 2) * half :, (corner % 2) * half :][:, :half, :half] += 1
        yield images, target


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = {"samix": {"lam_concat": False, "mask_loss": "l1_variance"}}.get(args.policy, {})
    config = from_dict({"model": {"backbone": args.model}, "policy": {"name": args.policy}, "automix": own})
    backbone = create_backbone(config.model, needed_feature(config), args.image_size)
    model = build_model(config, backbone, 4).to(device)  # with engine.immediate_backward, as its default is
    optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr, weight_decay=1e-4, momentum=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=args.epochs)
    update_momentum = MomentumUpdate(model)

    step = 0
    for epoch in range(epochs):
        losses = AverageMeter()
        model.train()
        for images, target in loader(16, args.batch_size, args.image_size, seed=epoch):
            images, target = images.to(device), target.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # holds inside too
                output = model(images, target, model.draw(images, seed=0, step=step), 0.1)
            optimizer.zero_grad()
            output.total.backward()
            optimizer.step()
            update_momentum(0.99)
            losses.update(output.total.item(), len(images))
            step += 1
        scheduler.step(epoch + 1)

        top1 = AverageMeter()
        model.eval()
        with torch.no_grad():
            for images, target in loader(4, args.batch_size, args.image_size, seed=-1):
                (acc1,) = accuracy(model(images.to(device)).query, target.to(device))
                top1.update(acc1.item(), len(images))
        print(f"Epoch {epoch}: loss {losses.avg:.3f}  Acc@1 {top1.avg:.2f}")

    # The query encoder is a plain timm model again: with its head it loads anywhere.
    exported = timm.create_model(args.model, num_classes=4, **layer_kwargs(config.model, args.image_size))
    exported.load_state_dict(backbone.model.state_dict(), strict=False)
    exported.get_classifier().load_state_dict(model.query.head_one.state_dict())


if __name__ == "__main__":
    main()
