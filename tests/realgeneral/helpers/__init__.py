"""What tests of realgeneral share."""
