"""What every other folder may use: files, processes, intervals, figures, tables. No model and no operator."""
