"""A recipe as a job: stage and micro batch from its plan, and its sbatch script."""
