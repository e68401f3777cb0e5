"""`karat predict`: the classes of any images, by a run or by a folder that was exported from one."""
