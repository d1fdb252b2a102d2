"""What other trainers (diffusers' scripts, kohya's, OneTrainer, EveryDream2) call the keys of this one, for whoever brings a config along."""

from __future__ import annotations

KEYS = {
    # what is trained
    "pretrained_model_name_or_path": "model.base", "base_model_name": "model.base", "resume_ckpt": "model.base", "mixed_precision": "model.precision",
    "train_dtype": "model.precision", "xformers": "model.attention: xformers", "train_text_encoder": "model.train: [unet, text_encoder]",
    "enable_xformers_memory_efficient_attention": "model.attention: xformers", "network_dim": "lora.rank", "network_alpha": "lora.alpha",
    "lora_rank": "lora.rank", "lora_alpha": "lora.alpha", "dim": "lora.rank", "network_module": "lora.rank",
    # on what
    "train_data_dir": "data.images", "instance_data_dir": "data.images", "data_root": "data.images", "dataset_name": "data.images", "instance_prompt": "data.caption",
    "enable_bucket": "data.aspect: buckets", "aspect_ratio_bucketing": "data.aspect: buckets", "center_crop": "data.crop: center", "random_crop": "data.crop: random",
    "random_flip": "data.flip", "flip_aug": "data.flip", "flip_p": "data.flip", "caption_dropout_rate": "data.caption_dropout", "cond_dropout": "data.caption_dropout",
    "num_repeats": "data.repeats", "repeats": "data.repeats", "multiply": "data.repeats", "shuffle_caption": "data.tag_orders", "shuffle_tags": "data.tag_orders", "enable_tag_shuffling": "data.tag_orders",
    "keep_tokens": "data.keep_tags", "keep_tags_count": "data.keep_tags", "masked_loss": "mask.images", "masked_training": "mask.images",
    "alpha_mask": "mask.images: alpha", "conditioning_data_dir": "mask.images", "mask_path": "mask.images", "unmasked_weight": "mask.outside",
    "class_data_dir": "prior.images", "reg_data_dir": "prior.images", "with_prior_preservation": "prior.images", "prior_loss_weight": "prior.weight",
    "class_prompt": "prior.caption", "num_class_images": "prior.images",
    # how
    "learning_rate": "schedule.max_lr", "lr": "schedule.max_lr", "unet_lr": "schedule.max_lr", "text_encoder_lr": "optimizer.text_encoder_scale",
    "lr_scheduler": "schedule.policy", "lr_warmup_steps": "schedule.warmup", "lr_scheduler_num_cycles": "schedule.cycles", "lr_decay_steps": "schedule.step_size",
    "max_train_steps": "train.steps", "max_steps": "train.steps", "max_train_epochs": "train.steps: 10 epochs", "num_train_epochs": "train.steps: 10 epochs",
    "max_epochs": "train.steps: 10 epochs", "epochs": "train.steps: 10 epochs", "train_batch_size": "batch.size", "batch_size": "batch.size",
    "gradient_accumulation_steps": "batch.accumulate", "grad_accum": "batch.accumulate", "optimizer_type": "optimizer.name", "use_8bit_adam": "optimizer.name: adamw8bit",
    "adam_beta1": "optimizer.betas", "adam_beta2": "optimizer.betas", "adam_weight_decay": "optimizer.weight_decay", "adam_epsilon": "optimizer.eps",
    "clip_grad_norm": "optimizer.max_grad_norm", "snr_gamma": "loss.min_snr_gamma", "offset_noise_weight": "loss.noise_offset",
    # what is kept and shown
    "output_name": "run.name", "project_name": "run.name", "logging_dir": "run.tensorboard", "save_every_n_steps": "checkpoint.every", "checkpointing_steps": "checkpoint.every",
    "save_every_n_epochs": "checkpoint.every", "ckpt_every_n_minutes": "checkpoint.every", "checkpoints_total_limit": "checkpoint.keep_last",
    "validation_prompt": "sample.prompts", "sample_prompts": "sample.prompts", "guidance_scale": "sample.guidance", "cfg": "sample.guidance",
    "val_split_proportion": "validation.fraction",
}  # fmt: skip
"""Their key, and the key (or key and value) of ours that does it."""
