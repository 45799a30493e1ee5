"""The schedules of the Hugging Face Trainer: a LambdaLR whose function follows from TrainingArguments.

formulas  the functions
program   the saved state with its function as a `Program`
"""
