"""Submit a recipe as a job: ZeRO stage and micro batch from its plan, and its sbatch script."""
