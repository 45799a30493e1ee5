"""What people ask for, as functions from Checkpoint to Checkpoint. No bytes move here."""
