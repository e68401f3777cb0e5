"""DeepSpeed and what it needs: ranks, devices, precision, optimizer, schedule, EMA, recomputation."""
