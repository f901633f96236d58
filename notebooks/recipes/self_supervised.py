"""Pretrain without labels, by EsViT's losses on views and regions: `python self_supervised.py --data-dir IMAGES`.

A student sees views of an image at several sizes; a teacher, the average of past students, sees the large ones. The
student learns to say of each view, and of each region of it, what the teacher says of the others
(https://arxiv.org/abs/2106.09785; the loss on views is that of DINO, https://arxiv.org/abs/2104.14294).
"""
import math
import warnings
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import lightning
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from finetune import (
    ReplayableImages,
    check_output,
    make_schedule,
    open_images,
    save_weights,
    seed_for,
    steps_per_epoch,
    training_parser,
)
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import DINOTransform
from lightly.utils.benchmarking import knn_predict
from lightly.utils.scheduler import cosine_schedule, linear_warmup_schedule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning_finetune import train_loader
from PIL import Image
from region_loss import RegionLoss, Regions, at_least_float32
from timm.optim import create_optimizer_v2
from timm.utils import ParseKwargs
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import RandomResizedCrop

from timm_ls.cli import whole_number

DEEP_MODES = ('I', 'F')  # more than 8 bits per channel; Pillow clips what it converts from them
MIN_CROP = 32
PATIENCE = 20  # checks in a row that find the outputs collapsed before a run is stopped
LEAST_INFORMATION = .01  # of the view about its output, in nats; log K at most
LEAST_DEVIATION = .01  # of normalized features, where 1 is that of features in all directions


def parser(description):
    """The arguments, with EsViT's values where it has them."""
    parser = training_parser(description, 'folder with images, in folders or not')
    parser.set_defaults(epochs=300, weight_decay=.04, warmup=10 / 300, clip_grad=3.)
    parser.add_argument('--pretrained', action='store_true', help="start from the model's pretrained weights")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='for timm, as name=value')
    parser.add_argument('--devices', default='auto', help='processes on this machine, one for each GPU')
    parser.add_argument('--num-nodes', type=int, default=1, help='machines')
    parser.add_argument('--lr', type=float, default=5e-4, help='learning rate per 256 images of a step')
    parser.add_argument('--weight-decay-end', type=float, default=.4, help='what --weight-decay becomes, by a cosine')
    parser.add_argument('--momentum', type=float, default=.996, help='of the teacher, at first; becomes 1, by a cosine')
    parser.add_argument('--region-weight', type=float, default=.5, help='of the loss on regions; the rest is on views')
    parser.add_argument('--output-dim', type=whole_number(), default=65536, help='logits of the heads')
    parser.add_argument('--hidden-dim', type=whole_number(), default=2048,
                        help='channels of the hidden layers of the heads')
    parser.add_argument('--bottleneck-dim', type=whole_number(), default=256,
                        help='channels of the layer before the logits')
    parser.add_argument('--norm-last-layer', action='store_true', help='stabler heads, a little worse')
    parser.add_argument('--freeze-last-layer', type=int, default=1, help='epochs in which that layer is not trained')
    parser.add_argument('--student-temp', type=float, default=.1)
    parser.add_argument('--teacher-temp', type=float, default=.07, help='temperature of the teacher')
    parser.add_argument('--warmup-teacher-temp', type=float, default=.04, help='that of the first step')
    parser.add_argument('--teacher-temp-warmup', type=float, default=.1, help='part of the steps in which it rises')
    parser.add_argument('--global-size', type=int, nargs='+', default=[224], help='large crops: side, or height width')
    parser.add_argument('--local-size', type=int, nargs='+', default=[96], help='small crops')
    parser.add_argument('--local-crops', type=int, default=8, help='small crops per image, besides two large ones')
    parser.add_argument('--global-scale', type=float, nargs=2, default=[.4, 1.], help='part of the image in one')
    parser.add_argument('--local-scale', type=float, nargs=2, default=[.05, .4], help='part of the image in one')
    parser.add_argument('--labeled-dir', help='for kNN accuracy: a folder per class, or such folders train and val')
    parser.add_argument('--knn-epochs', type=whole_number(), default=10, help='epochs between two measurements')
    return parser


def check_arguments(args):
    """Sizes as (height, width); exits where values contradict each other."""
    for name in ('global_size', 'local_size'):
        size = getattr(args, name)
        if len(size) > 2 or min(size) < MIN_CROP:
            raise SystemExit(
                f'--{name.replace("_", "-")} {" ".join(map(str, size))}: expected a side or a height and a width,'
                f' {MIN_CROP} pixels or more.')
        setattr(args, name, (size[0], size[-1]))
    for name in ('global_scale', 'local_scale'):
        smallest, largest = getattr(args, name)
        if not 0 < smallest <= largest <= 1:
            raise SystemExit(
                f'--{name.replace("_", "-")} {smallest} {largest}: expected parts of the image, 0 < from <= to <= 1.')
    if not 0 <= args.region_weight <= 1:
        raise SystemExit(f'--region-weight {args.region_weight}: expected a value from 0 to 1.')
    if not 0 < args.warmup_teacher_temp <= args.teacher_temp:
        raise SystemExit(
            f'--warmup-teacher-temp {args.warmup_teacher_temp} --teacher-temp {args.teacher_temp}: expected a'
            ' temperature that rises from above 0.')


class UnlabeledImages(Dataset):
    """Views of images. One that cannot be decoded gives way to the next one and is counted."""

    def __init__(self, paths):
        self.paths = paths
        self.transform = None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        for skipped in range(len(self.paths)):
            path = self.paths[(index + skipped) % len(self.paths)]
            try:
                with Image.open(path) as file:
                    image = file.convert('RGB')
            except Exception as error:  # Pillow raises many kinds
                warnings.warn(f'{path} is skipped, it cannot be decoded: {error}', stacklevel=1)
            else:
                return self.transform(image), skipped
        raise RuntimeError(f'None of {len(self.paths)} images can be decoded.')


def defect(path):
    """What makes an image unfit for training, by its header, or None."""
    try:
        with Image.open(path) as image:
            if image.mode.split(';')[0] in DEEP_MODES:
                return f'its mode is {image.mode}, convert it to 8 bits per channel'
    except Exception as error:  # Pillow raises many kinds
        return str(error)
    return None


def find_images(args):
    """All images below the folder that can be opened; says what is left out, and exits if less than two are left."""
    root = Path(args.data_dir)
    if not root.is_dir():
        raise SystemExit(f'There is no folder {root}.')
    found = sorted(path for path in root.rglob('*') if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    with ThreadPoolExecutor(max(1, args.workers)) as pool:
        defects = {path: reason for path, reason in zip(found, pool.map(defect, found)) if reason}
    paths = [str(path) for path in found if path not in defects]
    example = next((f' The first one is {path}: {reason}.' for path, reason in defects.items()), '')
    summary = f'{len(paths)} images in {root}, {len(defects)} others are skipped.{example}'
    if len(paths) < 2:
        raise SystemExit(f'{summary} Expected two images or more to learn from.')
    rank_zero_only(print)(summary)
    return ReplayableImages(UnlabeledImages(paths), args.seed)


def multi_crop(args, mean, std):
    """DINO's augmentation by lightly, for large crops of any size and shape.

    Crops are cut out in the shape that they are resized to, give or take a third, and blur is as wide, in parts of a
    large crop, as at DINO's 224 pixels.
    """
    scale = min(args.global_size) / 224
    transform = DINOTransform(
        global_crop_size=args.global_size,
        global_crop_scale=tuple(args.global_scale),
        local_crop_size=args.local_size,
        local_crop_scale=tuple(args.local_scale),
        n_local_views=args.local_crops,
        sigmas=(.1 * scale, 2 * scale),
        normalize=dict(mean=mean, std=std),
    )
    for view in transform.transforms:
        steps = view.transform.transforms
        height, width = steps[0].size
        ratio = 3 / 4 * width / height, 4 / 3 * width / height
        steps[0] = RandomResizedCrop(steps[0].size, steps[0].scale, ratio, steps[0].interpolation)
    return transform


class View(NamedTuple):
    """One view of each image of a batch: pooled features [B, C] and their logits [B, K], the same by region."""

    features: torch.Tensor
    logits: torch.Tensor
    regions: Regions


class Branch(nn.Module):
    """Student or teacher: a backbone, a head for views and, with a loss on regions, one for those."""

    def __init__(self, args, drop_path_rate):
        super().__init__()
        options = dict(args.model_kwargs)
        if timm.models.model_entrypoint(args.model).__module__.startswith('timm_ls.'):
            options.setdefault('img_size', args.global_size)  # bias tables of full attention
        if args.pretrained_path:
            options['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)
        self.backbone = timm.create_model(
            args.model, pretrained=args.pretrained or bool(args.pretrained_path), num_classes=0,
            drop_path_rate=drop_path_rate or None, **options)
        channels = self.count_channels(args)
        head = dict(
            hidden_dim=args.hidden_dim, bottleneck_dim=args.bottleneck_dim, output_dim=args.output_dim,
            norm_last_layer=args.norm_last_layer, freeze_last_layer=args.freeze_last_layer)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)  # lightly's heads use torch's older weight_norm
            self.view_head = DINOProjectionHead(channels[0], **head)
            self.region_head = DINOProjectionHead(channels[1], **head) if args.region_weight else None

    @torch.no_grad()
    def count_channels(self, args):
        """Channels of pooled features and of regions; exits if the model does not give both for crops of both sizes."""
        self.backbone.eval()
        try:
            for size in (args.global_size, args.local_size):
                pooled, regions = self.features(torch.zeros(1, 3, *size))
                if pooled.ndim != 2 or regions.ndim != 4:
                    raise ValueError(f'pooled features {list(pooled.shape)}, map {list(regions.shape)}')
        except Exception as error:
            raise SystemExit(
                f'{args.model} gives no pooled features and NCHW map for crops of {size[0]} x {size[1]} pixels, by'
                f' forward_intermediates and forward_head: {error}') from error
        self.backbone.train()
        return pooled.shape[1], regions.shape[1]

    def features(self, x):
        """Pooled features [B, C], as a classifier would see them, and the last map, normed, [B, C, H, W]."""
        final, (regions,) = self.backbone.forward_intermediates(x, indices=1, norm=True)
        return self.backbone.forward_head(final, pre_logits=True), regions

    def forward(self, crops):
        """A `View` for each of the crops; neighbors of the same size pass through the backbone together."""
        views = []
        for _, group in groupby(crops, key=lambda x: x.shape[-2:]):
            group = list(group)
            pooled, regions = self.features(torch.cat(group))
            regions = regions.flatten(2).mT  # [views * B, N, C]
            outputs = [pooled, self.view_head(pooled)]
            if self.region_head is not None:
                outputs += [regions, self.region_head(regions)]
            for pooled, logits, *by_region in zip(*[x.chunk(len(group)) for x in outputs]):
                views.append(View(pooled, logits, Regions(*by_region) if by_region else None))
        return views

    def no_weight_decay(self):
        return {f'backbone.{name}' for name in getattr(self.backbone, 'no_weight_decay', set)()}


class SelfDistillation(nn.Module):
    """Student, teacher and the losses between them."""

    def __init__(self, args):
        super().__init__()
        torch.manual_seed(args.seed)
        self.region_weight = args.region_weight
        self.student = Branch(args, args.drop_path)
        self.teacher = Branch(args, 0.)
        self.teacher.load_state_dict(self.student.state_dict())
        deactivate_requires_grad(self.teacher)
        self.student.backbone.set_grad_checkpointing(args.grad_checkpointing)
        self.view_loss = DINOLoss(args.output_dim, student_temp=args.student_temp)
        self.region_loss = RegionLoss(args.output_dim, args.student_temp) if args.region_weight else None

    def forward(self, crops, teacher_temp):
        """Losses by name, 'loss' being the one to minimize, and the teacher's views.

        Args:
            crops: Lists of images [B, 3, H, W], large ones first; the teacher sees the first two.
            teacher_temp: Temperature of the teacher.
        """
        with torch.no_grad():
            teacher = self.teacher(crops[:2])
        student = self.student(crops)
        with torch.autocast(crops[0].device.type, enabled=False):
            losses = dict(view_loss=self.view_loss(
                [at_least_float32(view.logits) for view in teacher],
                [at_least_float32(view.logits) for view in student], teacher_temp))
            losses['loss'] = losses['view_loss']
            if self.region_loss is not None:
                losses['region_loss'] = self.region_loss(
                    [view.regions for view in student], [view.regions for view in teacher], teacher_temp)
                losses['loss'] = (
                    (1 - self.region_weight) * losses['view_loss'] + self.region_weight * losses['region_loss'])
        return losses, teacher


class Neighbors:
    """kNN accuracy of labeled images: of val by train, or of every second image by the others."""

    def __init__(self, args, backbone):
        train, val = open_images(Namespace(data_dir=args.labeled_dir, seed=args.seed))
        train = train.images
        config = timm.data.resolve_data_config(dict(input_size=(3, *args.global_size)), model=backbone)
        for images in (train, val or train):
            images.transform = timm.data.create_transform(**config)
        self.bank = train if val else Subset(train, range(0, len(train), 2))
        self.queries = val or Subset(train, range(1, len(train), 2))
        self.num_classes = len(train.classes)
        self.args = args

    def embed(self, branch, images, device):
        """Normalized features [N, C] and labels [N] of all images, each process having computed its part."""
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = Subset(images, range(rank, len(images), processes))
        features, labels = [], []
        for x, y in DataLoader(mine, self.args.batch_size, num_workers=self.args.workers):
            features.append(F.normalize(branch.features(x.to(device))[0].float()).cpu())
            labels.append(y)
        parts = [(torch.cat(features), torch.cat(labels))] if features else [None]
        if processes > 1:
            parts = parts * processes
            dist.all_gather_object(parts, parts[0])
        features, labels = zip(*filter(None, parts))
        return torch.cat(features), torch.cat(labels)

    @torch.no_grad()
    def accuracy(self, branch, device):
        branch.eval()
        bank, bank_labels = self.embed(branch, self.bank, device)
        right = 0
        for features, labels in zip(*[x.split(256) for x in self.embed(branch, self.queries, device)]):
            predicted = knn_predict(
                features, bank.T, bank_labels, self.num_classes, knn_k=min(20, len(bank)), knn_t=.07)
            right += (predicted[:, 0] == labels).sum().item()
        branch.train()
        return right / len(self.queries)


class Pretraining(lightning.LightningModule):
    def __init__(self, args, images):
        super().__init__()
        self.args, self.images = args, images
        self.distillation = SelfDistillation(args)
        backbone = self.distillation.teacher.backbone
        config = timm.data.resolve_model_data_config(backbone)
        images.images.transform = multi_crop(args, config['mean'], config['std'])
        self.neighbors = Neighbors(args, backbone) if args.labeled_dir else None
        self.register_buffer('collapsed_checks', torch.tensor(0))

    def train_dataloader(self):
        return train_loader(self.args, self.images, self.trainer)

    def configure_optimizers(self):
        args, processes = self.args, self.trainer.world_size
        self.steps = args.epochs * steps_per_epoch(args, self.images, processes)
        optimizer = create_optimizer_v2(
            self.distillation.student, 'adamw', lr=args.lr * args.batch_size * processes / 256,
            weight_decay=max(args.weight_decay, args.weight_decay_end))
        for group in optimizer.param_groups:
            group['decays'] = group['weight_decay'] > 0
        self.schedule = make_schedule(optimizer, args, self.steps)
        return optimizer

    def on_train_batch_start(self, batch, batch_idx):
        args, step = self.args, self.global_step
        self.schedule.step_update(step)
        for group in self.optimizers().param_groups:
            if group['decays']:
                group['weight_decay'] = cosine_schedule(step, self.steps, args.weight_decay, args.weight_decay_end)
        self.momentum = cosine_schedule(step, self.steps, args.momentum, 1.)
        self.teacher_temp = linear_warmup_schedule(
            step, int(args.teacher_temp_warmup * self.steps), args.warmup_teacher_temp, args.teacher_temp)
        # stochastic depth depends on the step, not on when the run was started
        torch.manual_seed(seed_for(args.seed, step, self.global_rank))

    def training_step(self, batch, batch_idx):
        crops, skipped = batch
        losses, teacher = self.distillation(crops, self.teacher_temp)
        if not torch.isfinite(losses['loss']):
            raise SystemExit(
                f'The loss is {losses["loss"].item()} in step {self.global_step}. Start again with a smaller --lr or'
                ' --clip-grad, a longer --warmup, or without --bf16.')
        self.log_dict(losses, prog_bar=True)
        self.log_dict(dict(lr=self.optimizers().param_groups[0]['lr'], teacher_temp=self.teacher_temp))
        self.log('skipped', skipped.sum().float(), on_step=False, on_epoch=True, reduce_fx='sum', sync_dist=True)
        if (self.global_step + 1) % self.args.log_steps == 0:
            self.check_collapse(teacher)
        return losses['loss']

    @torch.no_grad()
    def check_collapse(self, teacher):
        """Log how much the teacher's views differ; exits if they hardly did at many checks in a row."""
        logits = at_least_float32(torch.cat([view.logits for view in teacher])) - self.distillation.view_loss.center[0]
        measures = spread(
            (logits / self.teacher_temp).softmax(-1), at_least_float32(torch.cat([view.features for view in teacher])),
            lambda x: self.trainer.strategy.reduce(x, reduce_op='mean'))
        self.log_dict(measures)
        collapsed = measures['information'] < LEAST_INFORMATION or measures['deviation'] < LEAST_DEVIATION
        self.collapsed_checks = (self.collapsed_checks + 1) * collapsed
        if self.collapsed_checks >= PATIENCE:
            raise SystemExit(
                f'Collapsed: the teacher has said the same of all images for {PATIENCE * self.args.log_steps} steps.'
                f' Entropy of its output {measures["entropy"]:.4f} (at most {math.log(logits.shape[1]):.4f}),'
                f' information about the view {measures["information"]:.4f}, standard deviation of normalized features'
                f' {measures["deviation"]:.4f}. Start again with a smaller --lr or --teacher-temp, a --momentum closer'
                ' to 1, a longer --warmup, larger batches, or --norm-last-layer.')

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for head in (self.distillation.student.view_head, self.distillation.student.region_head):
            if head is not None:
                head.cancel_last_layer_gradients(self.current_epoch)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        # here, and not at the end of the batch, where checkpoints have been written already
        update_momentum(self.distillation.student, self.distillation.teacher, self.momentum)

    def on_train_epoch_end(self):
        epoch = self.current_epoch + 1
        if self.neighbors and (epoch % self.args.knn_epochs == 0 or epoch == self.args.epochs):
            accuracy = self.neighbors.accuracy(self.distillation.teacher, self.device)
            self.log('knn_accuracy', accuracy)
            rank_zero_only(print)(f'Epoch {epoch}: kNN accuracy {accuracy:.3f}')


def entropy(p):
    """Of distributions over the last dimension, in nats."""
    return -torch.special.xlogy(p, p).sum(-1)


def spread(outputs, features, average):
    """How much views differ: three numbers, of which the last two vanish when all views give the same.

    Args:
        outputs: Distributions [N, K], one per view.
        features: Of the views, [N, C].
        average: Mean over processes.

    Returns:
        `entropy` of an output, in nats, mean over views: 0 if it is certain, log K if it is uniform. `information` of
        an output about the view it belongs to: the entropy of the mean output minus `entropy`. `deviation` of
        normalized features: their standard deviation over views, mean over channels, times sqrt(C), at most 1.
    """
    features = F.normalize(features)
    K, C = outputs.shape[1], features.shape[1]
    moments = outputs.mean(0), entropy(outputs).mean(0, keepdim=True), features.mean(0), (features**2).mean(0)
    output, mean_entropy, first, second = average(torch.cat(moments)).split([K, 1, C, C])
    return dict(
        entropy=mean_entropy.item(),
        information=(entropy(output) - mean_entropy).item(),
        deviation=((second - first**2).clamp(min=0).sqrt().mean() * C**.5).item(),
    )


def main(argv=None):
    """Train, from the newest checkpoint with --resume."""
    args = parser(__doc__).parse_args(argv)
    check_arguments(args)
    images = find_images(args)
    checkpoint = check_output(args, sorted(Path(args.output).glob('step=*.ckpt')))

    module = Pretraining(args, images)
    trainer = lightning.Trainer(
        devices=args.devices,
        num_nodes=args.num_nodes,
        max_epochs=args.epochs,
        precision='bf16-mixed' if args.bf16 else '32-true',
        gradient_clip_val=args.clip_grad,
        callbacks=[ModelCheckpoint(args.output, filename='{step:08d}', every_n_train_steps=args.save_steps)],
        logger=CSVLogger(args.output, name='logs'),
        log_every_n_steps=args.log_steps,
        use_distributed_sampler=False,  # the sampler divides the images itself
        sync_batchnorm=torch.cuda.is_available(),  # torch has none for the CPU
    )
    trainer.fit(module, ckpt_path=checkpoint)
    if trainer.is_global_zero:
        save_weights(module.distillation.teacher.backbone.state_dict(), args)


if __name__ == '__main__':
    main()
