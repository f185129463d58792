"""The data of Long Range Arena (Tay et al. 2021, arXiv:2011.04006), task by task: from its files, or made anew."""
