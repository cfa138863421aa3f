"""What a student writes: the list of exercises, the student's copy, the grader."""
