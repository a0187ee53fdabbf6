"""Reports: one page, pictures and tables of what a study or a folder of runs found."""
