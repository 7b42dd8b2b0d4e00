#!/usr/bin/env bash
# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0
#
# Few-shot MVFA from the shell: draw images, train on 4 + 4 of them, test, predict, evaluate the checkpoint again.
# Nothing is downloaded. EPOCHS=50 trains as long as published.
set -euo pipefail
EPOCHS=${EPOCHS:-5}

python -m anomalib_mvfa.demo.phantoms --root phantoms --modalities '[brain_mri]' --counts '{train: 16, valid: 8, test: 8}'

model=(--model MVFA --model.backbone tiny)
data=(--data FewShot --data.k_shot 4 --data.train_batch_size 4
      --data.source MedicalBMAD --data.source.root phantoms --data.source.category BrainMRI --data.source.num_workers 0)

anomalib train "${model[@]}" "${data[@]}" --trainer.max_epochs "$EPOCHS" --seed_everything 0

run=results/MVFA/MedicalBMAD/BrainMRI/latest
checkpoint=$(readlink -f "$run")/weights/lightning/model.ckpt
head -3 "$run/images/predictions.csv"

anomalib predict --model MVFA --ckpt_path "$checkpoint" --data phantoms/BrainMRI/test/Ungood/img
anomalib test --model MVFA --ckpt_path "$checkpoint" "${data[@]}"
