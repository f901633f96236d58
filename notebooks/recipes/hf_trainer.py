"""Fine-tune with the Trainer of Hugging Face: `python hf_trainer.py --data-dir IMAGES`, torchrun for several GPUs."""
from pathlib import Path

import torch
from finetune import (
    ReplayableSampler,
    check_output,
    make_model,
    make_optimizer,
    open_images,
    parser,
    save_weights,
    seed_for,
)
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class ReplayingTrainer(Trainer):
    """Samples by epoch and index, and decays the learning rate from layer to layer."""

    def __init__(self, recipe, **kwargs):
        self.recipe = recipe
        self.sampler = ReplayableSampler(kwargs['train_dataset'], recipe.seed)  # accelerate divides it over processes
        super().__init__(**kwargs)

    def _get_train_sampler(self, *args, **kwargs):
        return self.sampler

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model.timm_model, self.recipe)
        return self.optimizer


class Replay(TrainerCallback):
    """Sets what a resumed run has to repeat: the sampler's epoch, and stochastic depth by the step."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))  # accelerate loses it with several processes

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(seed_for(args.seed, state.global_step, args.process_index))


def collate(samples):
    images, labels = zip(*samples)
    return dict(pixel_values=torch.stack(images), labels=torch.tensor(labels))


def accuracy(prediction):
    return dict(accuracy=(prediction.predictions.argmax(-1) == prediction.label_ids).mean().item())


def main(argv=None):
    """Train, from the newest complete checkpoint with --resume."""
    args = parser(__doc__).parse_args(argv)
    train, val = open_images(args)
    # written last: a checkpoint without it was cut short
    complete = Path(args.output).glob('checkpoint-*/trainer_state.json')
    checkpoint = check_output(args, sorted((path.parent for path in complete), key=lambda path: int(path.name[11:])))

    timm_model = make_model(args, train, val)
    labels = dict(enumerate(train.images.classes))
    model_args = dict(img_size=args.img_size) if args.img_size else {}
    config = TimmWrapperConfig(
        architecture=args.model, model_args=model_args, id2label=labels, label2id={v: k for k, v in labels.items()})
    model = TimmWrapperForImageClassification(config)
    model.timm_model = timm_model

    trainer = ReplayingTrainer(
        recipe=args,
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.lr,
            lr_scheduler_type='cosine',
            warmup_steps=args.warmup,  # below 1: a part of all steps
            max_grad_norm=args.clip_grad,
            bf16=args.bf16,
            eval_strategy='epoch' if val else 'no',
            save_strategy='steps',
            save_steps=args.save_steps,
            save_total_limit=2,
            logging_steps=args.log_steps,
            dataloader_num_workers=args.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            report_to='none',
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=train,
        eval_dataset=val,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    trainer.add_callback(Replay(trainer.sampler))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(Path(args.output) / 'final')
    if trainer.is_world_process_zero():
        save_weights(timm_model.state_dict(), args)


if __name__ == '__main__':
    main()
